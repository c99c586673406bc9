"""The config of experiments that compare networks over widths."""

import dataclasses
from typing import Any

from experiments.harness.experiment import Config
from experiments.harness.networks import Pair

__all__ = ["OverWidths"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverWidths(Config):
    """A base of configs that measure the networks of each replicate at several widths.

    Attributes:
      widths: widths of the networks in ascending order, each in place of the recipe's.
    """

    widths: tuple[int, ...]

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the field that is added here."""
        problems = super().problems()
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or self.widths[0] < 1:
            problems.append(f"widths: wanted ascending widths from 1 on, got {list(self.widths)}")
        return problems

    @property
    def width(self) -> str:
        """The widths of the networks, in words."""
        return f"width {', '.join(map(str, self.widths))}"

    @property
    def pairs(self) -> list[Pair]:
        """The networks of each replicate and width, all widths of a replicate in a row."""
        recipes = [dataclasses.replace(self.recipe, width=width) for width in self.widths]
        return [pair._replace(recipe=recipe) for pair in super().pairs for recipe in recipes]

    def misfits(self, record: Any, pair: Pair) -> list[str]:
        """Return the problems that the base finds, and that of the width."""
        problems = super().misfits(record, pair)
        if record.width != pair.recipe.width:
            problems.append(f"width: wanted {pair.recipe.width}, got {record.width}")
        return problems
