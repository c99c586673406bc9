"""Networks of the experiments: what is said of those that cannot be compared."""

import io

from rich.console import Console

from experiments.harness.console import Reporter
from experiments.harness.networks import Networks, Pair
from experiments.harness.results import Seconds
from rebasin.training.data import load_dataset
from rebasin.training.recipes import build_recipe

RECIPE = build_recipe(
    "instability", dataset="digits", model="mlp", width=16, epochs=1, warmup_epochs=0, peak_learning_rate=1e-8
)


def test_networks_and_children_that_learned_nothing_are_named(tmp_path):
    text = io.StringIO()
    networks = Networks(
        load_dataset("digits"),
        runs_dir=tmp_path / "runs",
        output_dir=tmp_path / "out",
        keep="ends",
        reporter=Reporter(Console(file=text, width=80)),
        seconds=Seconds(),
    )
    a, _ = networks.parents(Pair(RECIPE, (0, 1)), (0, 1))
    networks.child(a, a[0], 0, 1, lambda: None)
    said = " ".join(text.getvalue().split())
    for name in ("seed 0", "seed 1", "child 1 of seed 0 from epoch 0"):
        assert f"warning: {name} ends at a training loss of 2." in said
    assert "where guessing has 2.303: it has learned nothing" in said
    assert max(map(len, text.getvalue().splitlines())) <= 80
