"""From flags of a binary to its config, and from a stored config back to the flags that give it."""

import importlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from absl.testing import flagsaver

from experiments.harness.experiment import Config, Experiment
from experiments.harness.presets import PRESETS
from experiments.harness.serialisation import to_json
from rebasin.errors import RebasinError

__all__ = ["command_of", "config_of", "experiment_of", "flags_of", "load_binaries", "program"]

# The flag of each field of a config, where its name is another one. `None` for a field that follows from
# others.
_FLAGS = {"num_test": "num_eval", "recorded": None, "second": None, "thresholds": None, "recipe": None}

# The flag of the field `epochs`, by binary.
_EPOCHS = {
    "training_trajectories": "record_epochs",
    "sgd_instability": "spawn_epochs",
    "weight_magnitude": "prune_epochs",
    "layerwise_alignment": "rewind_epochs",
    "loss_landscape": "plane_epochs",
}

# Fields of the recipe that have a flag of the same name.
_RECIPE = ("dataset", "width", "epochs", "num_train", "warmup_epochs")

# In all binaries `width` is that of the recipe, and where there is a list of widths its first.
_SWEPT = ("strong_connectivity", "transitivity")


def load_binaries(names: Iterable[str]) -> None:
    """Import binaries, whose flags are known from then on."""
    for name in names:
        importlib.import_module(f"experiments.{name}")


def experiment_of(binary: str) -> Experiment[Any, Any, Any]:
    """Return the experiment of a binary that has one."""
    return importlib.import_module(f"experiments.{binary}").EXPERIMENT


def flags_of(binary: str) -> set[str]:
    """Return the names of the flags that a binary lists in its help."""
    module = importlib.import_module(f"experiments.{binary}")
    return {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)}


def config_of(binary: str, arguments: Sequence[str]) -> Config:
    """Return the config that a binary builds from flags; the flags of this process stay as they are.

    Args:
      binary: name of the binary.
      arguments: its flags, such as ``--preset=digits``.

    Raises:
      ConfigError: the config cannot work.
      flags.Error: there is no such flag, or its value cannot be read.
    """
    module = importlib.import_module(f"experiments.{binary}")
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS([binary, *arguments])
        return module.build_config()


def program(binary: str, arguments: Sequence[str]) -> str:
    """Return the command that runs a binary."""
    return " ".join(["python", "-m", f"experiments.{binary}", *arguments])


def command_of(binary: str, stored: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the shortest list of flags that gives a stored config, and what differs nevertheless.

    Args:
      binary: name of the binary.
      stored: the config as it stands in ``results.json``.

    Returns:
      Flags, and the names of fields that no flag sets, such as those of a recipe that has changed since.
    """
    found = [
        candidate for preset in _presets_for(stored) if (candidate := _flags_from(binary, stored, preset))
    ]
    if not found:
        return [], ["recipe"]
    return min(found, key=lambda candidate: (len(candidate[1]), len(" ".join(candidate[0]))))


def _presets_for(stored: Mapping[str, Any]) -> Iterator[list[str]]:
    recipe = stored["recipe"]
    for name, models in PRESETS.items():
        if recipe["model"] in models:
            first = recipe["model"] == next(iter(models))
            yield [f"--preset={name}", *([] if first else [f"--model={recipe['model']}"])]


def _flags_from(
    binary: str, stored: Mapping[str, Any], preset: list[str]
) -> tuple[list[str], list[str]] | None:
    """Return flags that begin with a preset; each further one mends a field that differs."""
    arguments, known = list(preset), flags_of(binary)
    try:
        # The recipe first: other fields, such as epochs, follow from it.
        for name in _RECIPE:
            wanted = stored["recipe"][name]
            if name == "width" and binary in _SWEPT:
                continue
            built = to_json(config_of(binary, arguments))["recipe"][name]
            if built != wanted and wanted is not None:
                arguments.append(f"--{name}={wanted}")
        for name, wanted in stored.items():
            flag = _EPOCHS.get(binary) if name == "epochs" else _FLAGS.get(name, name)
            if flag in known and wanted is not None:
                built = to_json(config_of(binary, arguments)).get(name)
                if built != wanted:
                    arguments.append(f"--{flag}={_text(wanted)}")
        return arguments, _differences(to_json(config_of(binary, arguments)), stored)
    except (RebasinError, flags.Error):
        return None


def _text(value: Any) -> str:
    return (
        ",".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value)
        if (isinstance(value, list))
        else str(value)
    )


def _differences(built: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return the names of fields that are built otherwise than stored; newer ones do not count."""
    differing = [
        name for name in stored if name not in ("recipe", "second") and built.get(name) != stored[name]
    ]
    for part in ("recipe", "second"):
        ours, theirs = built.get(part, {}), stored.get(part, {})
        differing += [f"{part}.{name}" for name in theirs if ours.get(name) != theirs[name]]
    return differing


def relative_name(path: pathlib.Path, root: pathlib.Path) -> str:
    """Return the name of a folder below a root, beginning with the root's own name."""
    return (pathlib.Path(root.resolve().name) / path.resolve().relative_to(root.resolve())).as_posix()
