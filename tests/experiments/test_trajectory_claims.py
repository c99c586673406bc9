"""Claims of section 5.1: each verdict by its rule."""

import numpy as np

from experiments.harness.results import claim
from experiments.trajectory_claims import early_epochs, judge


def test_claims_follow_their_rules():
    """On made-up curves of three replicates, by hand."""
    config = {
        "epochs": [0, 1, 2, 30],
        "methods": ["weights"],
        "thresholds": {"unaligned_above": 0.4, "any_epoch_at_most": 0.1, "end_at_most": 0.03},
    }

    def curve(shift):
        barriers = {
            "end": [0.0, 0.09 + shift, 0.05, 0.02],
            "same_epoch": [0.0, 0.19 + shift, 0.35, 0.02],
            "at_end": [0.8, 0.52 + shift, 0.3, 0.02],
        }
        own = {
            "barriers": {name: {"test_error": values} for name, values in barriers.items()},
            "distance": {"same_epoch": [9.0, 9.0, 8.0, 10.0], "end": [10.0] * 4},
        }
        return {"unaligned": {"test_error": [0, 0, 0, 0.5 + shift]}, "methods": {"weights": own}}

    found = {entry.id: entry for entry in judge(config, [curve(shift) for shift in (-0.01, 0.0, 0.01)])}
    measured = {
        "unaligned_barrier": 0.5,
        "one_permutation_aligns_every_epoch_weights": 0.09,
        "one_permutation_aligns_the_end_weights": 0.02,
        "early_permutations_fail_weights": 0.5,
        "early_permutations_are_closer": -0.15,
        "early_permutations_are_worse_in_place": 0.2,
    }
    assert {name: round(entry.measured, 6) for name, entry in found.items()} == measured
    assert all(entry.holds for entry in found.values())
    worse = {entry.id: entry.holds for entry in judge(config, [curve(s) for s in (-0.2, 0.0, 0.29)])}
    assert worse == dict.fromkeys(measured, True) | {
        "one_permutation_aligns_every_epoch_weights": False,
        "early_permutations_fail_weights": False,
    }
    assert early_epochs([0, 1, 2, 3, 4, 30]) == [1, 2, 3]
    assert early_epochs([0, 2, 4]) == [1]
    assert not claim("x", "", "", np.array([1.0, -0.1])).holds
    assert claim("x", "", "", np.array([1.0])).holds
    assert claim("x", "", "", np.array([-1.0]), below=True).holds
