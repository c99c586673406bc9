"""Errors of trajectories whose files are missing, damaged, or of another run."""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest

from rebasin.errors import TrajectoryError
from rebasin.training.data import load_dataset
from rebasin.training.loop import train
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")


@pytest.mark.parametrize("text", ["", '{"schema_version": 1', "[]", '{"schema_version": 1, "recipe": {}}'])
def test_a_damaged_run_json(copied, text):
    (copied / "run.json").write_text(text)
    with pytest.raises(TrajectoryError) as info:
        Trajectory(copied)
    assert str(info.value) == f"{copied}/run.json is damaged or was not written by this version of rebasin"


def test_a_run_json_of_another_schema(copied):
    content = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(TrajectoryError) as info:
        Trajectory(copied)
    assert str(info.value) == (
        f"{copied}/run.json has schema_version 99, and this version of rebasin reads 1 and 2"
    )


def test_an_epoch_that_is_not_there(finished):
    for read in (finished.__getitem__, finished.metrics):
        with pytest.raises(TrajectoryError) as info:
            read(7)
        assert str(info.value) == f"epoch 7 of {finished.directory} is not stored; stored epochs: 0-6"


def test_a_run_killed_before_its_first_checkpoint(copied, unfinished):
    trajectory = Trajectory(unfinished(0))
    assert trajectory.epochs == ()
    assert not trajectory.complete
    with pytest.raises(TrajectoryError) as info:
        _ = trajectory.last
    assert str(info.value) == f"epoch 0 of {copied} is not stored; stored epochs: none"


def truncate(path):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("damage", [truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize(
    "pattern", ["state/ocdbt.process_0/d/*", "state/d/*", "state/manifest.ocdbt", "state/_METADATA"]
)
def test_a_damaged_checkpoint(finished, copied, unfinished, pattern, damage):
    # All data files are damaged, because timing decides which of them holds a leaf.
    for path in (copied / "3").glob(pattern):
        damage(path)
    trajectory = Trajectory(copied)
    with pytest.raises(TrajectoryError) as info:
        trajectory[3]
    assert str(info.value) == (
        f"the checkpoint in {copied}/3 is damaged or incomplete. Other epochs can still be read; to make "
        "this one anew, delete the folders of epoch 3 and later, and train with resume=True"
    )
    chex.assert_trees_all_equal(trajectory[4], finished[4])

    # Following the advice of the message repairs the epoch.
    repaired = train(finished.recipe, DIGITS, seed=0, directory=unfinished(3), resume=True)
    chex.assert_trees_all_equal(repaired[3], finished[3])


def test_no_flipped_bit_goes_unnoticed(finished, copied):
    rng = np.random.default_rng(0)
    noticed = 0
    for path in sorted(path for path in (copied / "3").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in rng.integers(len(content), size=4 if "/d/" in str(path) else 1):
            flipped = bytearray(content)
            flipped[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            # Some flips have no effect: the momentum is not read, and not all bytes of headers are used.
            try:
                chex.assert_trees_all_equal(Trajectory(copied)[3], finished[3])
            except TrajectoryError as error:
                noticed += 1
                assert str(error).startswith(f"the checkpoint in {copied}/3 is damaged")  # noqa: PT017
            path.write_bytes(content)
    assert noticed
    chex.assert_trees_all_equal(Trajectory(copied)[3], finished[3])


def test_a_leaf_other_than_the_one_saved_is_damage(finished, copied):
    path = copied / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    content["custom_metadata"]["crc32"]["variables/params/Dense_1/bias"] ^= 1
    path.write_text(json.dumps(content))
    with pytest.raises(TrajectoryError, match=f"{copied}/3 is damaged") as info:
        Trajectory(copied)[3]
    assert str(info.value.__cause__) == "not as saved: variables/params/Dense_1/bias"


def test_checkpoints_without_checksums_can_be_read(finished, copied):
    path = copied / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    del content["custom_metadata"]["crc32"]
    path.write_text(json.dumps(content))
    chex.assert_trees_all_equal(Trajectory(copied)[3], finished[3])
    assert Trajectory(copied).metrics(3) == finished.metrics(3)


def test_stored_trees_must_fit_run_json(copied):
    path = copied / "run.json"
    content = json.loads(path.read_text())
    leaves = content["leaves"]
    leaves["params/Dense_0/kernel"] = "float32[8, 64]"
    leaves["params/Dense_1/bias"] = "float16[8]"
    leaves["params/Dense_9/bias"] = leaves.pop("params/Dense_3/bias")
    path.write_text(json.dumps(content))
    with pytest.raises(TrajectoryError) as info:
        Trajectory(copied)[2]
    assert str(info.value).splitlines() == [
        f"epoch 2 of {copied} is not the tree wanted:",
        "  variables/params/Dense_0/kernel: float32[64, 8] stored, float32[8, 64] wanted",
        "  variables/params/Dense_1/bias: float32[8] stored, float16[8] wanted",
        "  variables/params/Dense_9/bias: nothing stored, float32[10] wanted",
        "  variables/params/Dense_3/bias: float32[10] stored, nothing wanted",
    ]


def test_epochs_that_changed_places_are_refused(copied):
    (copied / "1").rename(copied / "elsewhere")
    (copied / "2").rename(copied / "1")
    (copied / "elsewhere").rename(copied / "2")
    trajectory = Trajectory(copied)
    for epoch, other in ((1, 2), (2, 1)):
        with pytest.raises(TrajectoryError) as info:
            trajectory[epoch]
        folder = copied / str(epoch)
        assert str(info.value) == (
            f"the checkpoint in {folder} was saved for epoch {other}; folders of epochs must not be moved or "
            "copied between runs"
        )
    trajectory[3]


def test_an_epoch_of_another_run_is_refused(copied, finished, tmp_path):
    recipe = dataclasses.replace(finished.recipe, epochs=2)
    for other in (
        train(finished.recipe, load_dataset("digits"), seed=1, directory=tmp_path / "seed"),
        train(recipe, load_dataset("digits"), seed=0, directory=tmp_path / "recipe"),
    ):
        shutil.rmtree(copied / "2")
        shutil.copytree(other.directory / "2", copied / "2")
        with pytest.raises(TrajectoryError, match=r"was saved for another run; folders of epochs must not"):
            Trajectory(copied)[2]
