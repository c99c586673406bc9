"""Makes errors in the library on purpose, one at a time, and sees whether a test fails.

  make mutate
  python -m benchmarks.mutate --only=matching/assignment
  python -m benchmarks.mutate --again
  python -m benchmarks.mutate --dry_run

The mutations are those of `benchmarks/mutation/catalogue.toml`. Each is made in a temporary copy of the
checkout, never in the checkout itself. Then its tests run in one process until the first fails. Before that,
all these tests run once on the code as it is, which also fills the cache of compiled programs that all share.

Writes the table in `docs/mutations.md` after every mutation; with --only or --again, the rows of the others
stay. The exit status is 1 if a mutation survives that the catalogue does not explain.
"""

import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence

from absl import flags

from benchmarks.command import run
from benchmarks.mutation.catalogue import Mutation, check_mutations, read_catalogue
from benchmarks.mutation.laboratory import Laboratory, Outcome
from benchmarks.reports import build_reporter, describe_machine
from rebasin.errors import ConfigError

__all__ = ["BEGIN", "END", "PAGE", "build_row", "choose", "main", "read_rows", "write_table"]

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs" / "mutations.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->"

_HEAD = ("file", "mutation", "killed by", "seconds")
_SURVIVED = "**survived**"


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_string("only", "", "Make only the mutations whose file or words contain this text.")
    flags.DEFINE_boolean(
        "again", False, "Make only the mutations that the table lacks or that survived in it."
    )
    flags.DEFINE_integer("timeout", 300, "Seconds after which a mutation counts as hanging.", lower_bound=1)
    flags.DEFINE_boolean("dry_run", False, "Only check that every mutation can be made.")


def choose(
    mutations: Sequence[Mutation], only: str, rows: Mapping[str, tuple[str, ...]] | None = None
) -> list[Mutation]:
    """Return the mutations whose name contains a text, and of which `rows` does not say that they are killed.

    Raises:
      ConfigError: there are none.
    """
    killed = [name for name, row in (rows or {}).items() if row[2] != _SURVIVED]
    chosen = [mutation for mutation in mutations if only in mutation.name and mutation.name not in killed]
    if not chosen:
        again = " and was not killed before" if rows is not None else ""
        raise ConfigError(f"no mutation has {only!r} in its file or words{again}")
    return chosen


def build_row(mutation: Mutation, outcome: Outcome) -> tuple[str, ...]:
    """Return the row of a mutation in the table."""
    killer = outcome.killed_by.partition("[")[0]
    return (
        f"`{mutation.file}`",
        mutation.words.replace("|", "\\|"),
        f"`{killer.rpartition('::')[2]}`" if "::" in killer else killer or _SURVIVED,
        f"{outcome.seconds:.0f}",
    )


def read_rows(text: str) -> dict[str, tuple[str, ...]]:
    """Return the rows of the table in a page, by the name of the mutation."""
    body = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    rows = [tuple(line.strip("| \n").split(" | ")) for line in body.splitlines() if line.startswith("| `")]
    return {f"{row[0].strip('`')}: {row[1]}".replace("\\|", "|"): row for row in rows}


def write_table(
    page: pathlib.Path, mutations: Sequence[Mutation], rows: Mapping[str, tuple[str, ...]], how: str
) -> None:
    """Write the table between the markers of a page, in the order of the catalogue.

    Args:
      page: the page.
      mutations: all mutations; rows of others are dropped.
      rows: a row for each mutation that was made, by its name.
      how: the sentence above the table, on how it was made.
    """
    text = page.read_text()
    known = [rows[mutation.name] for mutation in mutations if mutation.name in rows]
    survived = sum(row[2] == _SURVIVED for row in known)
    count = (
        f"{len(known)} of {len(mutations)} mutations: {len(known) - survived} killed, {survived} survived."
    )
    lines = [f"| {' | '.join(row)} |" for row in (_HEAD, ("---",) * len(_HEAD), *known)]
    notes = [
        f"- `{mutation.file}`, {mutation.words}: {mutation.survives or 'not explained yet.'}"
        for mutation in mutations
        if mutation.name in rows and rows[mutation.name][2] == _SURVIVED
    ]
    if notes:
        lines += ["", "Why those survived:", "", *notes]
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:begin] + "\n".join([how, "", count, "", *lines, ""]) + text[end:])


def _describe_run() -> str:
    """Say how the table was made."""
    machine = describe_machine()
    hardware = machine["hardware"]
    given = [
        f" --{name}={value}"
        for name, value in (("only", flags.FLAGS.only), ("again", flags.FLAGS.again))
        if value
    ]
    command = f"python -m benchmarks.mutate{''.join(given)}" if given else "make mutate"
    return (
        f"Last run: `{command}`, commit {machine['environment']['commit']}, one process on "
        f"{hardware['processor']} ({hardware['cores']} cores)."
    )


def main() -> None:
    """Make the mutations, run their tests, and write the table."""
    reporter, rows = build_reporter(), read_rows(PAGE.read_text())
    mutations = read_catalogue()
    check_mutations(mutations, ROOT)
    chosen = choose(mutations, flags.FLAGS.only, rows if flags.FLAGS.again else None)
    reporter.say(
        f"{len(chosen)} mutations of {len({mutation.file for mutation in chosen})} files can be made"
    )
    if flags.FLAGS.dry_run:
        return
    how, unexplained = _describe_run(), []
    with tempfile.TemporaryDirectory(prefix="rebasin_mutations_") as folder:
        laboratory = Laboratory(ROOT, pathlib.Path(folder), timeout=flags.FLAGS.timeout)
        plain = laboratory.run_unmutated([test for mutation in chosen for test in mutation.tests])
        if plain.killed_by:
            raise ConfigError(f"without any mutation {plain.killed_by} fails, so no mutation can be judged")
        reporter.say(f"their tests pass without any mutation, in {plain.seconds:.0f} s")
        for number, mutation in enumerate(chosen, 1):
            outcome = laboratory.run_mutated(mutation)
            rows[mutation.name] = build_row(mutation, outcome)
            write_table(PAGE, mutations, rows, how)
            end = f"killed by {outcome.killed_by}" if outcome.killed_by else "SURVIVED"
            reporter.say(f"{number}/{len(chosen)} {mutation.name}: {end} ({outcome.seconds:.0f} s)")
            if not outcome.killed_by and not mutation.survives:
                unexplained.append(mutation.name)
    if unexplained:
        sys.exit(f"{len(unexplained)} mutations survived unexplained:\n  " + "\n  ".join(unexplained))


if __name__ == "__main__":
    define_flags()
    run(main)
