"""The claims of section 5.1 and appendix H.1 about trajectories, by rules that were set before the runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.results import Claim, claim

__all__ = ["early_epochs", "judge"]


def early_epochs(epochs: Sequence[int]) -> list[int]:
    """Where in `epochs` training is early: from epoch 1 to a tenth of the last, at least the first of these.

    Examples:
      >>> early_epochs([0, 1, 2, 3, 5, 30]), early_epochs([0, 2, 4])
      ([1, 2, 3], [1])
    """
    trained = [i for i, epoch in enumerate(epochs) if epoch >= 1]
    return [i for i in trained if 10 * epochs[i] <= epochs[-1]] or trained[:1]


def _describe(epochs: Sequence[int]) -> str:
    return f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"


def judge(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """All claims, on test error barriers.

    Args:
      config: the config as in ``results.json``.
      curves: the measurements of each replicate.

    Returns:
      One claim for the networks without a permutation, those of each method, and, where both are there, one
      that compares weight with activation matching.
    """
    limit = config["thresholds"]["unaligned_above"]
    unaligned = np.array([curve["unaligned"]["test_error"][-1] for curve in curves])
    claims = [
        claim(
            "unaligned_barrier",
            f"without a permutation, the test error barrier at the end is above {limit:.0%}",
            "around 70 % (section 5.1, VGG-16 on CIFAR-10)",
            unaligned,
            unaligned.mean() > limit,
        )
    ]
    for method in config["methods"]:
        claims += _judge_method(config, curves, method)
    if "weights" in config["methods"]:
        claims += _judge_distances(config, curves)
    if {"weights", "activations"} <= set(config["methods"]):
        claims.append(_activations_earlier(config, curves))
    return claims


def _judge_method(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]], method: str) -> list[Claim]:
    epochs, limits = config["epochs"], config["thresholds"]
    early = early_epochs(epochs)
    first = epochs[early[0]]

    def barriers(name: str) -> np.ndarray:
        """Of replicate and epoch."""
        return np.array([curve["methods"][method]["barriers"][name]["test_error"] for curve in curves])

    # The worst epoch of the mean, rather than the mean of each replicate's worst, which chance would raise.
    worst = int(barriers("end").mean(axis=0).argmax())
    late = barriers("at_end")[:, early[0]] - barriers("at_end")[:, -1]
    limit, limit_end = limits["any_epoch_at_most"], limits["end_at_most"]
    return [
        claim(
            f"one_permutation_aligns_every_epoch_{method}",
            f"{method}: under P_end the test error barrier is at most {limit:.0%} at every epoch (highest at "
            f"epoch {epochs[worst]})",
            "3 to 8 % at any time (section 5.1; at most 9 % in the plots)",
            barriers("end")[:, worst],
            barriers("end")[:, worst].mean() <= limit,
        ),
        claim(
            f"one_permutation_aligns_the_end_{method}",
            f"{method}: under P_end it is at most {limit_end:.0%} at the end",
            "6 % (read off figure 4)",
            barriers("end")[:, -1],
            barriers("end")[:, -1].mean() <= limit_end,
        ),
        claim(
            f"early_permutations_fail_{method}",
            f"{method}: P_t from epoch {first} is worse at the end than P_end: the 95 % interval of the "
            "difference of test error barriers is above 0",
            "from epoch 3 a train error barrier of .89 is left, from 150 .08 (figure 8, weights)",
            late,
        ),
    ]


def _judge_distances(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Appendix H.1, on weight matching, whose objective the distance is."""
    early = early_epochs(config["epochs"])
    when = _describe([config["epochs"][i] for i in early])
    own = [curve["methods"]["weights"] for curve in curves]
    near, far = (np.array([o["distance"][name] for o in own]) for name in ("same_epoch", "end"))
    in_place, under_end = (
        np.array([o["barriers"][name]["test_error"] for o in own]) for name in ("same_epoch", "end")
    )
    return [
        claim(
            "early_permutations_are_closer",
            "weights: P_t[B_t] is closer to A_t in Euclidean distance than P_end[B_t] is: the 95 % interval "
            f"of the relative difference, averaged over {when}, is below 0",
            "P_t aligns weights more closely than P_end early in training (appendix H.1)",
            (near / far)[:, early].mean(axis=1) - 1,
            below=True,
        ),
        claim(
            "early_permutations_are_worse_in_place",
            "weights: and yet the test error barrier at t is higher under P_t than under P_end: the 95 % "
            f"interval of the difference, averaged over {when}, is above 0",
            "early in training weight matching fails where P_end aligns (figure 4, appendix H.1)",
            (in_place - under_end)[:, early].mean(axis=1),
        ),
    ]


def _activations_earlier(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> Claim:
    early = early_epochs(config["epochs"])
    when = _describe([config["epochs"][i] for i in early])
    left = {
        method: np.array([curve["methods"][method]["barriers"]["at_end"]["test_error"] for curve in curves])
        for method in ("weights", "activations")
    }
    return claim(
        "activations_succeed_earlier",
        f"applied at the end, P_t from {when} leaves a lower test error barrier by "
        "activation matching than by weight matching: the 95 % interval of the difference is above 0",
        "activation matching finds such a permutation earlier in training (appendix E, figures 7 and 8)",
        (left["weights"] - left["activations"])[:, early].mean(axis=1),
    )
