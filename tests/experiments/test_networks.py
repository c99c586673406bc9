"""Networks of the experiments: what is said of those that cannot be compared, and waiting for others."""

import io
from types import SimpleNamespace

import numpy as np
from rich.console import Console

from experiments.harness import networks as networks_module
from experiments.harness.console import Reporter
from experiments.harness.networks import Networks, Pair
from experiments.harness.results import Seconds
from rebasin.training.data import load_dataset
from rebasin.training.imp import Level
from rebasin.training.lock import FolderInUseError
from rebasin.training.loop import InitialState
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


def test_levels_and_masks_that_another_process_trains_are_waited_for(tmp_path, monkeypatch):
    """The second level is in use twice; every level comes once, in order, and the same holds for a mask."""
    text, ends = io.StringIO(), [FolderInUseError(tmp_path, "process 7")] * 2
    networks = Networks(
        load_dataset("digits"),
        runs_dir=tmp_path / "runs",
        output_dir=tmp_path / "out",
        keep="all",
        reporter=Reporter(Console(file=text, width=80)),
        seconds=Seconds(),
    )
    parent, advanced = SimpleNamespace(recipe=RECIPE, seed=3), []

    def levels(*_, levels, **__):
        for number in range(levels + 1):
            if number == 2 and ends:
                raise ends.pop()
            yield Level(number, None, SimpleNamespace())

    monkeypatch.setattr(networks_module, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(networks_module, "prune_iteratively", levels)
    options = {"rewind_epoch": 0, "rewind": "weights", "advance": lambda: advanced.append(None)}
    assert [level.level for level in networks.levels(parent, 3, **options)] == [0, 1, 2, 3]
    assert len(advanced) == 3
    assert text.getvalue().count("waiting for process 7") == 1

    ends += [FolderInUseError(tmp_path, "process 8")]
    seen = []

    def train(*_, seed, directory, **__):
        if ends:
            raise ends.pop()
        seen.append((seed, directory.name))
        return SimpleNamespace(last="tree")

    monkeypatch.setattr(networks_module, "train", train)
    start = InitialState({"w": np.zeros(2)}, 0)
    assert networks.retrained(parent, start, None, "mask") == "tree"
    assert networks.retrained(parent, start, None, "other", seed=5) == "tree"
    assert seen == [(3, "mask"), (5, "other")]
    assert text.getvalue().count("waiting for process 8") == 1
