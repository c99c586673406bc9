"""Activation matching: one assignment for each group, on the values that carry it.

Appendix A of arXiv 2404.06498; Li et al. 2015 (arXiv 1511.07543); arXiv 2211.08403 for correlations. Carriers
values carry a group is defined in `rebasin.tracing.sites`.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, InferenceError, NonFiniteError, problem_list
from rebasin.matching.grams import Term, best_rows, value_at
from rebasin.matching.responses import Carriers, Kernel, find_all_terms, measure, similarities
from rebasin.matching.result import MatchResult
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.tracing.program import Static
from rebasin.tracing.streaming import Batches, batch_shapes, check_examples
from rebasin.trees import check_finite, check_same_shapes, is_weight, leaf_table

__all__ = ["Carriers", "Kernel", "activation_matching"]


def activation_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    function: Callable[[Any, Any], Any],
    data: Any,
    *,
    batch_size: int = 500,
    carriers: Carriers = "last",
    kernel: Kernel = "inner",
) -> MatchResult:
    """Finds the permutation of B under which its units behave most like A's on the same data.

    For each group, similarity[i, j] is the mean product of unit i of A and unit j of B over all examples and
    positions of the values that carry the group, and one linear assignment maximises its sum. No hooks are
    needed: the function is traced, and its program is run with the values in question as further outputs.

    Units of a group that indexes others, such as heads, are paired by the value of the best match of their
    insides. A group whose carriers also carry other groups (as in an MLP-Mixer) waits until those are known,
    and is matched in a further pass over the data, with B permuted so far; where groups wait for each other,
    one is matched by those of its carriers that need not wait.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      function: ``(tree, batch) -> outputs``, the function that `spec` was made for.
      data: tree of arrays ``[n, …]`` with one common n; a batch is a slice of it.
      batch_size: examples evaluated at once. The last batch may be shorter. Memory does not depend on n.
      carriers: ``"last"`` takes the last carrier of each group, which is the paper's choice, after the last
        nonlinearity and before pooling or flattening (the last that carries no other group but its indices
        and insides, if there is one); ``"all"`` adds up the similarities of all of them: every block's output
        in a residual stream. `rebasin.tracing.sites` says what a carrier is.
      kernel: ``"inner"``, the inner product of the paper, which maximised makes the Euclidean distance least;
        or ``"correlation"``, each unit centred and divided by its deviation. Units that are constant over
        the data (dead ones) correlate with nothing.

    Returns:
      The match; its objective is the sum over the groups of the mean similarity of paired units, at the
      start (the identity) and at the end, in units of the kernel. ``stats`` has ``similarity`` (group to its
      share of both), ``constant_units`` (group to their numbers in A and B, for the correlation),
      ``passes`` over the data, ``examples`` and ``seconds``.

    Raises:
      ConfigError: an unknown kernel or choice of carriers, or an empty batch.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, allows less than `spec`, or has groups
        that no value carries.
      NonFiniteError: a leaf, an input or a similarity is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, -3.0]]), "v": np.ones((3, 1))}
      >>> b = {"w": np.array([[-3.0, 1.0, 2.0]]), "v": np.ones((3, 1))}
      >>> network = lambda tree, x: jnp.tanh(x @ tree["w"]) @ tree["v"]
      >>> match = activation_matching(spec, a, b, network, np.array([[1.0], [-2.0]]))
      >>> match.permutation["P0"].tolist()
      [1, 2, 0]
    """
    began = time.perf_counter()
    if kernel not in ("inner", "correlation"):
        raise ConfigError(f"unknown kernel {kernel!r}; known: 'inner', 'correlation'")
    if carriers not in ("last", "all"):
        raise ConfigError(f"unknown carriers {carriers!r}; known: 'last', 'all'")
    check_same_shapes(params_a, params_b)
    for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
        spec.group_sizes(tree, name=name)
        check_finite({path: leaf for path, leaf in leaf_table(tree).items() if is_weight(path, leaf)}, name)
    check_examples(data, batch_size)
    check_finite(jax.tree.map(jnp.asarray, data), "data")

    run = _Run(spec, params_a, params_b, Static(function), data, batch_size, carriers, kernel)
    permutation, start, end = run.match()
    stats = {
        "similarity": {group: (start[group], end[group]) for group in start},
        "constant_units": run.constant,
        "passes": run.passes,
        "examples": int(np.shape(jax.tree.leaves(data)[0])[0]),
        "seconds": time.perf_counter() - began,
    }
    objective = np.array([sum(start.values()), sum(end.values())])
    return MatchResult(permutation, objective, 1, True, stats)


class _Run:
    """One matching: the terms of every group, and what is known so far."""

    def __init__(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        function: Static,
        data: Any,
        batch_size: int,
        which: Carriers,
        kernel: Kernel,
    ) -> None:
        self.spec, self.params_a, self.params_b = spec, params_a, params_b
        self.data, self.kernel = data, kernel
        self.batches = Batches.of(data, batch_size)
        self.measure = functools.partial(measure, spec, function, self.batches, which, kernel)
        self.identity = identity_permutation(spec, params_a)
        shapes = batch_shapes(data, self.batches.size)
        # A group of one unit has nothing to match.
        groups = [group for group in spec.groups if self.identity[group].shape[-1] > 1]
        self.terms = find_all_terms(spec, function, which, tuple(groups), params_a, shapes)
        lost = [f"{group!r}" for group, terms in self.terms.items() if not terms]
        if lost:
            advice = "keep them with infer_spec(…, pin=[…]) or match weights"
            raise InferenceError(problem_list(f"no value that depends on the data carries ({advice}):", lost))
        self.constant: dict[str, tuple[int, int]] = {}
        self.passes = 0

    def match(self) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]:
        """The permutation, and each group's similarity at the start and at the end."""
        known: dict[str, np.ndarray] = {}
        start: dict[str, float] = {}
        end: dict[str, float] = {}
        while pending := [group for group in self.terms if group not in known]:
            ready = self._ready(pending, known)
            grams = self._grams(ready, self.identity | known)
            found: dict[str, np.ndarray] = {}
            for group in (group for group in self.spec.outward if group in ready):
                # Groups of earlier passes are aligned already.
                found[group] = best_rows(self.spec, group, grams[group], self.identity | found)
            for family in _families(self.spec, tuple(ready)):
                rows = {group: found[group] for group in family}
                before, after = (
                    {g: value_at(self.spec, grams[g], self.identity | move) for g in family}
                    for move in ({}, rows)
                )
                if sum(after.values()) < sum(before.values()):
                    rows, after = {group: self.identity[group] for group in family}, before
                known |= rows
                start |= before
                end |= after
        return self.identity | known, start, end

    def _ready(self, pending: Sequence[str], known: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """The groups to match in the next pass, with the terms that count.

        Those whose neighbours in all their carriers are known; else those of which that holds for some of
        them, which then count alone; else the first family as it is.
        """
        usable = {
            group: [
                i
                for i, term in enumerate(self.terms[group])
                if term.foreign & self.terms.keys() <= known.keys()
            ]
            for group in pending
        }
        for wanted in (
            lambda group: len(usable[group]) == len(self.terms[group]),
            lambda group: usable[group],
        ):
            families = [f for f in _families(self.spec, pending) if all(wanted(group) for group in f)]
            if families:
                return {group: usable[group] for family in families for group in family}
        return {group: list(range(len(self.terms[group]))) for group in _families(self.spec, pending)[0]}

    def _grams(
        self, ready: dict[str, list[int]], permutation: dict[str, np.ndarray]
    ) -> dict[str, list[tuple[Term, np.ndarray]]]:
        """Mean products, or correlations, of the units of each term of each group."""
        self.passes += 1
        moved = permute(self.spec, permutation, self.params_b)
        wanted = tuple((group, tuple(indices)) for group, indices in ready.items())
        totals, shifts = jax.device_get(self.measure(wanted, self.params_a, moved, self.data))
        sums = totals.value()
        grams = {}
        for group, indices in ready.items():
            grams[group] = []
            constant = np.zeros(2, int)
            for i, term in enumerate(self.terms[group][j] for j in indices):
                shift = None if shifts is None else shifts[group][i]
                values, silent = similarities(sums[group][i], shift, self.kernel)
                if not np.isfinite(values).all():
                    raise NonFiniteError(
                        f"the values that carry group {group!r} are not finite on these data"
                    )
                grams[group].append((term, values))
                constant += silent
            if self.kernel == "correlation":
                self.constant[group] = (int(constant[0]), int(constant[1]))
        return grams


def _families(spec: PermutationSpec, groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups that index each other, together."""
    outer = spec.outer_groups
    families: list[set[str]] = []
    for group in groups:
        family = {group, *(o for o in outer.get(group, ()) if o in groups)}
        for other in [other for other in families if other & family]:
            families.remove(other)
            family |= other
        families.append(family)
    return [tuple(group for group in groups if group in family) for family in families]
