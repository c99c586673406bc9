"""The mutations of ``catalogue.toml``, read and checked against a checkout."""

import pathlib
import tomllib
from collections.abc import Iterable
from typing import Any, NamedTuple

from rebasin.errors import ConfigError, problem_list

__all__ = ["CATALOGUE", "Mutation", "check_mutations", "mutate", "mutations_of", "read_catalogue"]

CATALOGUE = pathlib.Path(__file__).with_name("catalogue.toml")

# What a mutation has to say, and what it may say.
_NEEDED, _OPTIONAL = ("file", "words", "old", "new", "why"), ("tests", "survives")


class Mutation(NamedTuple):
    """One error that somebody could make in one file.

    Attributes:
      file: path of the file in the checkout.
      words: what the mutation does, in a few words; no two mutations of a file have the same.
      old: text that stands in the file exactly once.
      new: text that takes its place.
      why: what it would do to a user.
      tests: test files, or single tests as ``file::test``, of which one should fail.
      survives: why no test can fail, for an equivalent mutation; empty otherwise.
    """

    file: str
    words: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
    survives: str = ""

    @property
    def name(self) -> str:
        """File and words together, by which ``--only`` finds a mutation."""
        return f"{self.file}: {self.words}"


def read_catalogue(path: pathlib.Path = CATALOGUE) -> list[Mutation]:
    """Read all mutations.

    Raises:
      ConfigError: the file is no catalogue; the message lists every entry at fault.
    """
    try:
        return mutations_of(tomllib.loads(path.read_text()).get("mutation", []))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML file: {error}") from error


def mutations_of(entries: Iterable[dict[str, Any]]) -> list[Mutation]:
    """Return the mutations of a catalogue's entries.

    An entry without `tests` has those of the test file that mirrors its file, as
    ``tests/matching/test_weights.py`` does ``rebasin/matching/weights.py``.

    Raises:
      ConfigError: an entry lacks a key or has an unknown one, or two have the same name.
    """
    problems, found = [], {}
    for number, entry in enumerate(entries, 1):
        missing = [key for key in _NEEDED if key not in entry]
        unknown = [key for key in entry if key not in (*_NEEDED, *_OPTIONAL)]
        if missing or unknown:
            problems.append(f"mutation {number}: missing {missing}, unknown {unknown}")
            continue
        tests = tuple(entry.get("tests", [_mirror(entry["file"])]))
        mutation = Mutation(**{**entry, "tests": tests})
        if mutation.name in found:
            problems.append(f"mutation {number}: there is another one called {mutation.name!r}")
        found[mutation.name] = mutation
    if problems:
        raise ConfigError(problem_list("the catalogue of mutations cannot be read:", problems))
    return list(found.values())


def _mirror(file: str) -> str:
    path = pathlib.PurePosixPath(file)
    return str(pathlib.PurePosixPath("tests", *path.parts[1:-1], f"test_{path.name}"))


def check_mutations(mutations: Iterable[Mutation], root: pathlib.Path) -> None:
    """Check that every mutation can be made, and that its tests exist.

    Args:
      mutations: the mutations.
      root: the checkout.

    Raises:
      ConfigError: the old text of a mutation does not stand in its file exactly once, its new text is the
        old one, or a test file does not exist. Every such mutation is listed.
    """
    problems = []
    for mutation in mutations:
        path = root / mutation.file
        if not path.is_file():
            problems.append(f"{mutation.name}: no such file")
            continue
        count = path.read_text().count(mutation.old)
        if count != 1:
            problems.append(f"{mutation.name}: its old text occurs {count} times, wanted once")
        if mutation.old == mutation.new:
            problems.append(f"{mutation.name}: it changes nothing")
        problems += [
            f"{mutation.name}: no test {test}" for test in mutation.tests if not _test_exists(root, test)
        ]
    if problems:
        raise ConfigError(problem_list("mutations do not fit the code:", problems))


def _test_exists(root: pathlib.Path, test: str) -> bool:
    name, _, function = test.partition("::")
    path = root / name
    return path.is_file() and (not function or f"def {function.partition('[')[0]}(" in path.read_text())


def mutate(mutation: Mutation, text: str) -> str:
    """Return the text of a file with a mutation.

    Examples:
      >>> mutate(Mutation("file.py", "sign", "a + b", "a - b", "", ()), "total = a + b")
      'total = a - b'
    """
    return text.replace(mutation.old, mutation.new)
