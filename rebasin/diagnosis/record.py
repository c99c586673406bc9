"""The numbers of a diagnosis, as typed data."""

from typing import NamedTuple

from rebasin.diagnosis.streams import BlockMatch

__all__ = ["GroupNumbers", "LayerNumbers", "MidpointNumbers", "Performance", "StreamNumbers"]


class Performance(NamedTuple):
    """Mean loss (cross entropy, in nats) and 0–1 error (a fraction) of a network on the data."""

    loss: float
    error: float


class LayerNumbers(NamedTuple):
    """What sets two networks apart in one layer.

    Attributes:
      path: path name of the weight.
      overlap_before: overlap of the leading singular vectors of A and B as they are, at most 1; see
        `rebasin.diagnosis.layers.singular_overlaps` (Ito et al. 2024, arXiv 2402.04051).
      overlap: the same with B permuted.
      variance: variance of the layer's outputs at the midpoint, as a share of what it would be with the
        standard deviations halfway between those of A and B (REPAIR, arXiv 2211.08403); `None` for a layer
        that REPAIR leaves alone, such as the last.
      norm_ratio: ‖A‖ / ‖B‖ of the weight.
    """

    path: str
    overlap_before: float
    overlap: float
    variance: float | None
    norm_ratio: float


class GroupNumbers(NamedTuple):
    """How well the units of a group are paired, and what activation matching would change.

    Attributes:
      groups: the name of the group; more names where groups depend on each other, outer ones first.
      units: number of units.
      correlation: mean correlation over the data of paired units that are not constant.
      best_correlation: the same for the permutation that is best for it (Li et al. 2015, arXiv 1511.07543).
      moved: share of the units that activation matching pairs otherwise.
      replaced: the midpoint where this group alone has the permutation of activation matching, by inner
        products (appendix A of arXiv 2404.06498).
      rematched: the midpoint where this group alone has the permutation that is best by weights while all
        others stay (one assignment of algorithm 1 of arXiv 2209.04836); `None` for nested groups too.
    """

    groups: tuple[str, ...]
    units: int
    correlation: float
    best_correlation: float
    moved: float
    replaced: Performance | None
    rematched: Performance | None


class StreamNumbers(NamedTuple):
    """What it costs that one permutation must serve all layers that write into a group.

    Attributes:
      group: the group.
      blocks: the match of each block alone, beside the shared one.
    """

    group: str
    blocks: tuple[BlockMatch, ...]

    @property
    def conflict(self) -> float:
        """The largest cosine that a block gains over the shared permutation and over chance."""
        return max((block.gain for block in self.blocks), default=0.0)


class MidpointNumbers(NamedTuple):
    """Loss and error at the two ends and at the midpoint, with and without remedies.

    Attributes:
      a: network A.
      b: network B.
      before: the midpoint with B as it is.
      permuted: the midpoint with B permuted; all that follows is with B permuted too.
      temperature: the softmax temperature that fits the midpoint best (arXiv 2510.08023).
      tempered_loss: the loss at that temperature, fitted on the same data; it leaves the error alone.
      repaired: with REPAIR (arXiv 2211.08403).
      by_activations: with all groups permuted by activation matching.
      rescaled: with over-scaled layers of B scaled to the norms of A's, where that is a symmetry of B.
      loss_error: standard error of the midpoint's loss above the mean of the ends, paired over examples.
      error_error: the same of the error.
    """

    a: Performance
    b: Performance
    before: Performance
    permuted: Performance
    temperature: float
    tempered_loss: float
    repaired: Performance
    by_activations: Performance
    rescaled: Performance | None
    loss_error: float
    error_error: float

    @property
    def ends(self) -> Performance:
        """The mean of both ends."""
        return Performance((self.a.loss + self.b.loss) / 2, (self.a.error + self.b.error) / 2)
