"""Networks of the experiments: what is said of those that cannot be compared."""

import dataclasses
import io

import pytest
from rich.console import Console

from experiments.console import Reporter
from experiments.networks import Networks
from experiments.pairs import Pair
from experiments.results import Results
from rebasin.data import load_dataset
from rebasin.recipes import build_recipe

RECIPE = build_recipe(
    "instability", dataset="digits", model="mlp", width=16, epochs=2, warmup_epochs=0, batch_size=32
)


@pytest.mark.parametrize(("rate", "warned"), [(1e-8, True), (0.1, False)])
def test_networks_and_children_that_learned_nothing_are_named(rate, warned, tmp_path):
    text = io.StringIO()
    networks = Networks(
        load_dataset("digits"),
        runs_dir=tmp_path / "runs",
        output_dir=tmp_path / "out",
        keep="ends",
        reporter=Reporter(Console(file=text, width=80)),
        results=Results("test", {}),
    )
    recipe = dataclasses.replace(RECIPE, peak_learning_rate=rate)
    a, _ = networks.parents(Pair(recipe, (0, 1)), (0, 2))
    networks.child(a, a[0], 0, 1, lambda: None)
    said = " ".join(text.getvalue().split())
    for name in ("seed 0", "seed 1", "child 1 of seed 0 from epoch 0"):
        assert (f"warning: {name} ends at a training loss of 2." in said) == warned
    assert ("where guessing has 2.303: it has learned nothing" in said) == warned
    assert max(map(len, text.getvalue().splitlines())) <= 80
