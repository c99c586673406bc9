import itertools

import chex
import jax
import numpy as np
import pytest
from helpers import build_case

import rebasin
from rebasin import all_pairs_matching
from rebasin.errors import ConfigError
from rebasin.matching.many import merge_many

KEY = jax.random.key(0)
OPTIONS = {"num_steps": 2, "batch_size": 40, "learning_rate": 0.5}


@pytest.fixture(scope="module")
def case():
    return build_case("mlp")


@pytest.fixture(scope="module")
def trees(case):
    return [case.params_a, case.params_b, case.planted]


def objective(case, trees):
    losses = []
    for a, b in itertools.combinations(trees, 2):
        middle = rebasin.interpolate(a, b, 0.5)
        losses.append(float(case.metrics_fn(middle, case.data)["loss"].mean()))
    return -np.mean(losses)


def test_the_objective_is_that_of_all_pairs_and_never_falls(case, trees):
    found = all_pairs_matching(case.spec, trees, case.metrics_fn, case.data, key=KEY, **OPTIONS)
    assert found.objective[-1] == pytest.approx(objective(case, found.align(case.spec, trees)), rel=1e-4)
    assert (np.diff(found.objective) >= 0).all()
    assert found.objective[-1] > found.objective[0]
    merged = merge_many(case.spec, trees, key=jax.random.fold_in(KEY, 0))
    assert found.objective[0] >= objective(case, merged.align(case.spec, trees)) - 1e-4
    assert rebasin.fixed_points(found.permutations[0]).total == 1


def test_planted_networks_become_one(case):
    trees = [case.params_a, case.planted]
    found = all_pairs_matching(case.spec, trees, case.metrics_fn, case.data, key=KEY, **OPTIONS)
    chex.assert_trees_all_close(found.align(case.spec, trees)[1], case.params_a, rtol=1e-6)


def test_the_best_start_is_taken_and_improved(case, trees):
    """Its order of units may be any; that of the result is network 0's."""
    known = all_pairs_matching(case.spec, trees, case.metrics_fn, case.data, key=KEY, **OPTIONS)
    common, poor = (rebasin.random_permutation(case.spec, trees[0], key=jax.random.key(i)) for i in range(2))
    better = [rebasin.compose(case.spec, p, common) for p in known.permutations]
    found = all_pairs_matching(
        case.spec, trees, case.metrics_fn, case.data, key=KEY, starts=[[poor] * 3, better], **OPTIONS
    )
    assert found.objective[0] == pytest.approx(known.objective[-1], rel=1e-5)
    assert found.objective[-1] >= found.objective[0]
    assert rebasin.fixed_points(found.permutations[0]).total == 1


def test_restarts_keep_the_best_run(case, trees):
    found = all_pairs_matching(case.spec, trees, case.metrics_fn, case.data, key=KEY, restarts=2, **OPTIONS)
    assert len(found.stats["runs"]) == 3
    assert found.objective[-1] == max(found.stats["runs"])


def test_what_does_not_fit_is_refused(case, trees):
    arguments = (case.metrics_fn, case.data)
    with pytest.raises(ConfigError, match="all_pairs_matching needs at least two networks, got 1"):
        all_pairs_matching(case.spec, trees[:1], *arguments, key=KEY)
    with pytest.raises(ConfigError, match="a permutation for each of 3 networks, got 0"):
        all_pairs_matching(case.spec, trees, *arguments, key=KEY, starts=[[]])
    with pytest.raises(ConfigError, match="num_steps must be at least 1, got 0"):
        all_pairs_matching(case.spec, trees, *arguments, key=KEY, num_steps=0)
