"""Measures a pair of networks for a diagnosis, one suspected cause after the other."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rebasin.arithmetic import interpolate
from rebasin.barrier import build_evaluation, classification_metrics, standard_error
from rebasin.batches import Batch, batch_shapes, num_examples
from rebasin.diagnosis.groups import families, is_nested, match_by_weights
from rebasin.diagnosis.layers import WeightOfLayer, singular_overlaps, weights_of_layers
from rebasin.diagnosis.record import GroupNumbers, LayerNumbers, MidpointNumbers, Performance, StreamNumbers
from rebasin.diagnosis.scales import norm_ratios, rescale
from rebasin.diagnosis.streams import match_blocks, stream_groups
from rebasin.matching.activations import ActivationMatching
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, compiled_permute, fixed_points, identity_permutation
from rebasin.repair import Repair, build_repair
from rebasin.roles import RoleNames
from rebasin.spec import PermutationSpec
from rebasin.temperature import build_temperature
from rebasin.tracing.program import trace_program
from rebasin.tracing.sites import find_layers

__all__ = ["Pair", "measure"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """Two networks, the permutation to look into, and data; all of it checked.

    Attributes:
      spec: the symmetries of the networks.
      apply_fn: the function of the networks.
      params_a: tree of A.
      params_b: tree of B as it is.
      moved: tree of B permuted.
      permutation: the permutation that was applied to B.
      inputs: the inputs of the data, as a tuple.
      batch: the data with labels; `None` where loss and error cannot be measured.
      batch_size: number of examples that are evaluated at once.
      roles: roles of leaves.
    """

    spec: PermutationSpec
    apply_fn: Callable[..., Any]
    params_a: Any
    params_b: Any
    moved: Any
    permutation: Permutation
    inputs: Any
    batch: Batch | None
    batch_size: int
    roles: RoleNames

    def evaluation(
        self, metrics_fn: Callable[..., Any], prepare: Callable[..., Any] | None = None
    ) -> Callable[..., dict[str, np.ndarray]]:
        """Make ``evaluate(params_b, alpha=0.5) -> {metric: [n]}`` for points of the path from A."""
        evaluate = build_evaluation(
            metrics_fn,
            lambda trees, alpha: interpolate(trees[0], trees[1], alpha, roles=self.roles),
            batch_size=self.batch_size,
            prepare=prepare,
            roles=self.roles,
        )

        def at(params_b: Any, alpha: float = 0.5) -> dict[str, np.ndarray]:
            trees = {"params_a": self.params_a, "params_b": params_b}
            values = evaluate(trees, np.array([alpha]), self.batch)
            return {name: examples[0] for name, examples in values.items()}

        return at


def measure(
    pair: Pair,
) -> tuple[
    tuple[LayerNumbers, ...], tuple[GroupNumbers, ...], tuple[StreamNumbers, ...], MidpointNumbers | None
]:
    """Measure layers, groups, streams and the midpoint of a pair."""
    shapes = batch_shapes(pair.inputs, min(pair.batch_size, num_examples(pair.inputs)))
    program = trace_program(pair.spec, pair.apply_fn, pair.params_a, *shapes)
    weights = weights_of_layers(pair.spec, find_layers(program))
    repair = build_repair(
        pair.spec,
        pair.params_a,
        pair.moved,
        pair.apply_fn,
        pair.inputs,
        batch_size=pair.batch_size,
        roles=pair.roles,
    )
    evaluate = None if pair.batch is None else pair.evaluation(classification_metrics(pair.apply_fn))
    layers = _measure_layers(pair, weights, repair)
    groups, matched = _measure_groups(pair, evaluate)
    streams = tuple(
        StreamNumbers(group, match_blocks(pair.spec, weights, group, pair.params_a, pair.moved, pair.roles))
        for group in stream_groups(pair.spec, weights)
    )
    if evaluate is None:
        return layers, groups, streams, None
    midpoint = _measure_midpoint(
        pair, weights, repair, evaluate, compiled_permute(pair.spec, matched, pair.moved)
    )
    return layers, groups, streams, midpoint


def _performance(values: dict[str, np.ndarray]) -> Performance:
    return Performance(*(float(np.mean(values[name], dtype=np.float64)) for name in ("loss", "error")))


def _measure_layers(pair: Pair, weights: Sequence[WeightOfLayer], repair: Repair) -> tuple[LayerNumbers, ...]:
    middle = interpolate(pair.params_a, pair.moved, 0.5, roles=pair.roles)
    variances = dict(zip(repair.layers, repair.variance_ratios(middle, 0.5), strict=True))
    overlaps = singular_overlaps(pair.spec, weights, pair.params_a, pair.params_b, pair.permutation)
    ratios = norm_ratios(weights, pair.params_a, pair.params_b)
    return tuple(
        LayerNumbers(w.path, *overlaps[w.path], variances.get(w.path), ratios[w.path]) for w in weights
    )


def _measure_groups(
    pair: Pair, evaluate: Callable[..., Any] | None
) -> tuple[tuple[GroupNumbers, ...], dict[str, np.ndarray]]:
    """Match activations; return the groups, and the permutation that was found, on top of the given one."""
    match, correlated = (
        ActivationMatching(similarity=similarity, batch_size=pair.batch_size, roles=pair.roles or ()).match(
            pair.spec, pair.params_a, pair.moved, apply_fn=pair.apply_fn, data=pair.inputs
        )
        for similarity in ("inner", "correlation")
    )
    stay = identity_permutation(pair.spec, pair.moved)

    def with_rows(rows: dict[str, np.ndarray]) -> Performance | None:
        if evaluate is None:
            return None
        return _performance(evaluate(compiled_permute(pair.spec, stay | rows, pair.moved)))

    found = []
    for family in families(pair.spec):
        rows = {group: match.permutation[group] for group in family}
        innermost, rematched = family[-1], None
        if evaluate is not None and not is_nested(pair.spec, innermost):
            by_weights = match_by_weights(pair.spec, innermost, pair.params_a, pair.moved, pair.roles)
            rematched = with_rows({innermost: by_weights})
        found.append(
            GroupNumbers(
                family,
                int(np.size(stay[innermost])),
                *_correlations(correlated, innermost),
                1 - fixed_points({innermost: rows[innermost]}).total,
                with_rows(rows),
                rematched,
            )
        )
    return tuple(found), match.permutation


def _correlations(match: MatchResult, group: str) -> tuple[float, float]:
    """Return the mean correlation of paired units that are not constant, at the start and at the end."""
    if group not in match.stats["similarity"]:  # a group of one unit is not matched
        return float("nan"), float("nan")
    alive = np.size(match.permutation[group]) - max(match.stats["constant_units"][group])
    start, end = match.stats["similarity"][group]
    return start / max(alive, 1), end / max(alive, 1)


def _measure_midpoint(
    pair: Pair,
    weights: Sequence[WeightOfLayer],
    repair: Repair,
    evaluate: Callable[..., Any],
    matched: Any,
) -> MidpointNumbers:
    assert pair.batch is not None
    ends = [evaluate(pair.moved, alpha) for alpha in (1.0, 0.0)]
    permuted = evaluate(pair.moved)
    noise = {name: permuted[name] - (ends[0][name] + ends[1][name]) / 2 for name in ("loss", "error")}
    temperature = build_temperature(pair.apply_fn, pair.batch, batch_size=pair.batch_size)

    def tempered(params: Any, batch: Batch, fitted: jax.Array) -> dict[str, jax.Array]:
        metrics = temperature.metrics_fn(params, batch, fitted)
        return {"loss": metrics["tempered_loss"], "temperature": fitted + 0 * metrics["loss"]}

    cooled = pair.evaluation(tempered, temperature.prepare)(pair.moved)
    repaired = pair.evaluation(classification_metrics(repair.apply), repair.prepare)(pair.moved)
    rescaled = rescale(
        pair.spec,
        weights,
        pair.params_a,
        pair.moved,
        functools.partial(_outputs, pair),
    )
    return MidpointNumbers(
        a=_performance(ends[0]),
        b=_performance(ends[1]),
        before=_performance(evaluate(pair.params_b)),
        permuted=_performance(permuted),
        temperature=float(cooled["temperature"][0]),
        tempered_loss=float(np.mean(cooled["loss"], dtype=np.float64)),
        repaired=_performance(repaired),
        by_activations=_performance(evaluate(matched)),
        rescaled=_performance(evaluate(rescaled.params)) if rescaled.paths else None,
        loss_error=float(standard_error(noise["loss"])),
        error_error=float(standard_error(noise["error"])),
    )


def _outputs(pair: Pair, params: Any) -> Any:
    """Evaluate the network on the first batch."""
    return jax.jit(pair.apply_fn)(params, *jax.tree.map(lambda x: x[: pair.batch_size], pair.inputs))
