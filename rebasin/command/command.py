"""What a command is: flags of its own, a page of help, and a function."""

import dataclasses
import textwrap
from collections.abc import Callable, Sequence

from absl.flags import FlagValues

from rebasin.errors import ConfigError

__all__ = ["Command"]


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
      name: what the shell calls it.
      about: what it does, with an example.
      flags: its flags, with their default values.
      required: names of flags that must be given.
      run: does the work, from flags that were parsed.
    """

    name: str
    about: str
    flags: FlagValues
    required: tuple[str, ...]
    run: Callable[[FlagValues], None]

    def parse(self, arguments: Sequence[str]) -> FlagValues | None:
        """Return the flags with the values that were given; `None` where help was asked for and printed.

        Args:
          arguments: what follows the command's name.

        Raises:
          ConfigError: a flag that must be given is not, or there is an argument that is no flag.
          absl.flags.Error: a flag is unknown, or has an impossible value.
        """
        if {"--help", "-help", "-h"} & set(arguments):
            print(self.help())
            return None
        self.flags.unparse_flags()
        for name in self.flags:
            self.flags[name].unparse()  # a second call in one process begins with the defaults
        rest = self.flags([self.name, *arguments])[1:]
        if rest:
            raise ConfigError(f"rebasin {self.name} takes flags alone, got {' '.join(rest)}")
        if lacking := [f"--{name}" for name in self.required if not self.flags[name].present]:
            raise ConfigError(f"rebasin {self.name} needs {', '.join(lacking)}; see --help")
        return self.flags

    def help(self) -> str:
        """Return the page of help, at most 80 columns wide."""
        lines = [self.about.strip(), "", "flags:"]
        for name in self.flags:
            flag = self.flags[name]
            default = "" if flag.default in (None, [], False) else f" (default: {flag.default})"
            needed = " (must be given)" if name in self.required else ""
            text = f"--{name}: {flag.help}{needed}{default}"
            lines.append(textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="      "))
        return "\n".join(lines)
