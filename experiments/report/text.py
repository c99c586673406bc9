"""Sentences and signs that the report has in both of its forms."""

__all__ = ["INTRODUCTION", "INTRODUCTION_TABLE", "MARKS", "TITLE", "minutes"]

TITLE = "What is reproduced, and how well"

INTRODUCTION = (
    "Made by `python -m experiments.reproduce` from the `results.json` files of the experiments and from the "
    "figures beside them alone.",
    "A number is the mean over independent replicates, with the 95 % interval of the mean in brackets. "
    "Barriers are those of Eq. 1, errors are in % of test examples, losses in nats. Networks are matched by "
    "two algorithms: `best` is this project's default, `paper` is Algorithm 1 of arXiv 2404.06498. P_t is "
    "the permutation that is found at epoch t, P_end that of the last epoch. Each claim has a rule that was "
    "set before the run; it holds or it does not.",
)

INTRODUCTION_TABLE = (
    "One row for each figure of the paper. The sign tells whether all, some or none of the claims behind a "
    "row hold on a network, of which w is the width; both algorithms and both matchings count."
)

# A sign for each verdict, so that colour is not all that tells them apart.
MARKS = {"holds": "✓", "in part": "◐", "does not hold": "✗"}


def minutes(seconds: float) -> str:
    """Return a time in the unit that fits it.

    Examples:
      >>> minutes(90), minutes(5400), minutes(36_000)
      ('90 s', '90 min', '10.0 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
