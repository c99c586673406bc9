"""Flags that every experiment binary shares; only a binary's `main` reads them."""

import os
import pathlib
from collections.abc import Sequence

from absl import flags, logging

from experiments.matchers import METHODS
from experiments.networks import KEEP
from experiments.presets import PRESETS
from rebasin.errors import ConfigError

__all__ = [
    "DATA_DIR",
    "DATASET",
    "EPOCHS",
    "KEEP_CHECKPOINTS",
    "MATCHING",
    "MODEL",
    "NUM_ALPHAS",
    "NUM_EVAL",
    "NUM_MATCH",
    "OUTPUT_DIR",
    "PRESET",
    "REPLICATES",
    "RESUME",
    "SEED",
    "STRICT",
    "WARMUP_EPOCHS",
    "WIDTH",
    "choose_epochs",
    "hush_library_logs",
    "runs_directory",
]

PRESET = flags.DEFINE_enum(
    "preset",
    "digits",
    list(PRESETS),
    "What fills in every flag that is not given: digits (seconds), cpu (minutes "
    "to an hour), paper (the full recipe, for an accelerator).",
)
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for results.json, the CSV and the figure.", required=True
)
RUNS_DIR = flags.DEFINE_string(
    "runs_dir",
    None,
    "Folder of trained networks, found again by recipe and seed. By default OUTPUT_DIR/runs for the "
    "preset digits, else $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs.",
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first network; the others follow.", lower_bound=0)
REPLICATES = flags.DEFINE_integer("replicates", None, "Independent pairs of networks.", lower_bound=1)
DATASET = flags.DEFINE_string("dataset", None, "digits, mnist, cifar10, cifar100 or svhn_cropped.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."
)
MODEL = flags.DEFINE_string("model", None, "mlp, vgg16 or resnet20, where the preset has a recipe for it.")
WIDTH = flags.DEFINE_integer("width", None, "Width of the model.", lower_bound=1)
EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs of training.", lower_bound=1)
RESUME = flags.DEFINE_bool("resume", False, "Go on with an unfinished run in OUTPUT_DIR.")
STRICT = flags.DEFINE_bool("strict", False, "Exit with status 1 if a claim does not hold.")
MATCHING = flags.DEFINE_list(
    "matching", ",".join(METHODS), f"Matching methods, in the order of the figures: {', '.join(METHODS)}."
)
WARMUP_EPOCHS = flags.DEFINE_integer("warmup_epochs", None, "Epochs of learning rate warm-up.", lower_bound=0)
NUM_ALPHAS = flags.DEFINE_integer(
    "num_alphas", 25, "Points on each segment, both ends included.", lower_bound=2
)
NUM_EVAL = flags.DEFINE_integer(
    "num_eval", None, "Examples of each split on which segments are measured.", lower_bound=1
)
NUM_MATCH = flags.DEFINE_integer(
    "num_match", None, "Training examples on which activations are matched.", lower_bound=1
)
KEEP_CHECKPOINTS = flags.DEFINE_enum(
    "keep_checkpoints",
    None,
    list(KEEP),
    "What stays on disk of the networks that this run trains: "
    + "; ".join(f"{name}: {what}" for name, what in KEEP.items())
    + ".",
)


def choose_epochs(given: Sequence[str] | None, preset: Sequence[int] | None, last: int) -> tuple[int, ...]:
    """The epochs of a flag, else those of a preset that lie before the last one.

    Raises:
      ConfigError: the flag's value is not a list of numbers.
    """
    if given is None:
        return tuple(epoch for epoch in preset or range(last) if epoch < last)
    try:
        return tuple(int(epoch) for epoch in given)
    except ValueError:
        raise ConfigError(f"wanted epochs, such as 0,1,5, got {','.join(given)!r}") from None


def hush_library_logs() -> None:
    """Leaves warnings alone on the terminal unless --verbosity asks for more: JAX reports backends."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)


def runs_directory() -> pathlib.Path:
    """Where trained networks are kept, by flag, environment and preset."""
    if RUNS_DIR.value:
        return pathlib.Path(RUNS_DIR.value)
    if PRESET.value == "digits":
        return pathlib.Path(OUTPUT_DIR.value) / "runs"
    return pathlib.Path(os.environ.get("REBASIN_RUNS_DIR", "~/.cache/rebasin/runs")).expanduser()
