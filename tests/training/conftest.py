"""A finished run, and copies of it that a test may damage."""

import shutil

import pytest

from rebasin.training.data import load_dataset
from rebasin.training.loop import train
from rebasin.training.recipes import Recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of six epochs, all of them stored, which no test may change."""
    recipe = Recipe("digits", "mlp", width=8, epochs=6, num_train=200, batch_size=64, warmup_epochs=1)
    return train(
        recipe, load_dataset("digits"), seed=0, directory=tmp_path_factory.mktemp("runs") / "finished"
    )


@pytest.fixture
def copied(finished, tmp_path):
    """The folder of a copy of the finished run."""
    return shutil.copytree(finished.directory, tmp_path / "copied")


@pytest.fixture
def unfinished(finished, copied):
    """A function that deletes all but the first `num_epochs` epochs of the copy and returns its folder."""

    def cut(num_epochs):
        for epoch in finished.epochs[num_epochs:]:
            shutil.rmtree(copied / str(epoch))
        return copied

    return cut
