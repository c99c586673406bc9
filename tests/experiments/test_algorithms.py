"""``--algorithm``: what it makes of the two methods of the paper, and where it is written down."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from small_experiment import small_config

import rebasin
from experiments import compare_methods, learning_rates, sgd_instability, training_trajectories
from experiments.harness.algorithms import ALGORITHMS, algorithm_options
from experiments.harness.experiment import Setup
from experiments.harness.figures import entitle
from experiments.harness.methods import build_matchers
from experiments.harness.presets import PRESETS
from experiments.harness.results import Results, Seconds, open_results
from rebasin.errors import ConfigError
from rebasin.training.data import load_dataset

BINARIES = (training_trajectories, sgd_instability, compare_methods, learning_rates)


def draw_networks(rng):
    """Two MLPs of three hidden layers whose every leaf is random."""
    shapes = [(5, 12), (12, 12), (12, 12), (12, 3)]
    return [
        {
            f"Dense_{i}": {
                "kernel": rng.normal(size=shape).astype(np.float32),
                "bias": rng.normal(size=shape[1]).astype(np.float32),
            }
            for i, shape in enumerate(shapes)
        }
        for _ in range(2)
    ]


MLP_SPEC = rebasin.PermutationSpec.from_axes(
    {
        f"Dense_{i}/{leaf}": axes
        for i in range(4)
        for leaf, axes in (
            ("kernel", (f"P{i - 1}" if i else None, f"P{i}" if i < 3 else None)),
            ("bias", (f"P{i}" if i < 3 else None,)),
        )
    }
)


def greedy_soblap(params_a, params_b, orders):
    """Algorithm 1 of the paper, step by step in float64, every group in every iteration.

    It ends as the text of appendix A says: when no group's similarity improves in a whole iteration.
    """

    def rows(tree, k):
        layer, following = tree[f"Dense_{k}"], tree[f"Dense_{k + 1}"]
        return np.concatenate([layer["kernel"].T, layer["bias"][:, None], following["kernel"]], axis=1)

    a, b = (
        {n: {k: v.astype(float) for k, v in leaf.items()} for n, leaf in t.items()}
        for t in (params_a, params_b)
    )
    permutations = [np.arange(12) for _ in range(3)]
    for number, order in enumerate(orders, start=1):
        improved = False
        for k in order:
            gram = rows(a, k) @ rows(b, k).T
            p = linear_sum_assignment(gram, maximize=True)[1]
            improved |= gram[np.arange(12), p].sum() > np.trace(gram) + 1e-9
            for leaf, values in b[f"Dense_{k}"].items():
                b[f"Dense_{k}"][leaf] = values[..., p]
            b[f"Dense_{k + 1}"]["kernel"] = b[f"Dense_{k + 1}"]["kernel"][p]
            permutations[k] = permutations[k][p]
        if not improved:
            return permutations, number
    raise AssertionError("did not end")


def test_paper_weights_are_algorithm_1_step_by_step():
    """Groups whose neighbours have not changed are skipped, and the permutations are the same."""
    iterations = []
    for seed in range(12):
        a, b = draw_networks(np.random.default_rng(seed))
        key = jax.random.key(seed)
        ours = rebasin.match(MLP_SPEC, a, b, "weights", key=key, **algorithm_options("paper", "weights"))
        words = np.asarray(jax.random.key_data(key)).ravel().tolist()
        orders = [np.random.default_rng([*words, i]).permutation(3) for i in range(1, 101)]
        wanted, number = greedy_soblap(a, b, orders)
        for k in range(3):
            np.testing.assert_array_equal(ours.permutation[f"P{k}"], wanted[k])
        # The letter's last iteration changes nothing; here it is made only as far as groups are stale.
        assert number - 1 <= ours.num_iterations <= number
        iterations.append(number)
    assert max(iterations) > 4


def test_the_algorithm_reaches_the_methods():
    a, b = draw_networks(np.random.default_rng(0))

    def start(algorithm, **options):
        config = small_config(algorithm=algorithm)
        setup = Setup(config, load_dataset("digits"), None, MLP_SPEC, None, Seconds(), None)
        match = build_matchers(setup, ["weights"], options=options)["weights"]
        return match(a, b).stats["start"]

    assert {name: start(name) for name in ALGORITHMS} == {"paper": "identity", "best": "depth"}
    # An option of one experiment goes before that of the algorithm.
    assert start("paper", weights={"start": "depth"}) == "depth"


@pytest.mark.parametrize("binary", BINARIES, ids=lambda binary: binary.__name__)
def test_the_paper_matches_on_all_training_data(binary):
    def config(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS([binary.__name__, "--output_dir=out", "--preset=cpu", *arguments])
            found = binary.build_config()
        return found.algorithm, found.num_match

    assert config() == ("best", 5_000)
    assert config("--algorithm=paper") == ("paper", None)
    assert config("--algorithm=paper", "--num_match=70") == ("paper", 70)
    assert config("--preset=paper", "--model=mlp") == ("paper", None)
    assert config("--preset=paper", "--algorithm=best") == ("best", None)
    assert {name: {p.algorithm for p in models.values()} for name, models in PRESETS.items()} == {
        **dict.fromkeys(PRESETS, {"best"}),
        "paper": {"paper"},
    }


def test_old_results_are_of_the_best_algorithm(tmp_path):
    schema = training_trajectories.EXPERIMENT.schema
    path = tmp_path / "results.json"
    Results(schema.experiment, small_config()).save(path)
    content = json.loads(path.read_text())
    assert content["config"].pop("algorithm") == "best"
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert training_trajectories.EXPERIMENT.load(path).config == small_config()
    assert open_results(tmp_path, schema, small_config(), resume=True).config.algorithm == "best"
    with pytest.raises(ConfigError, match=r"of another config.*\n  algorithm: 'best' there, 'paper' wanted$"):
        open_results(tmp_path, schema, small_config(algorithm="paper"), resume=True)


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match="algorithm: wanted one of paper, best, got 'greedy'"):
        small_config(algorithm="greedy")


def test_captions_name_the_algorithm():
    figure = Figure()
    entitle(figure, Results("test", small_config(algorithm="paper")), "networks", "a note")
    assert figure.get_suptitle() == ("mlp (width 16) on digits, 2 pairs of networks, algorithm paper\na note")
