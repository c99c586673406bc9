"""The flags of experiment binaries, and what every binary does with them; only binaries import this.

Most flags are shared by all binaries and defined when this module is imported. `define_flags` lists them in
the help of a binary, and defines those flags that only some binaries have. Flags of one binary alone are
defined in its own file.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
from absl import app, flags, logging

import rebasin
from experiments.harness.algorithms import ALGORITHMS, PAPER_ALGORITHM
from experiments.harness.connectivity import JOINT
from experiments.harness.deadline import Deadline
from experiments.harness.experiment import C, Experiment
from experiments.harness.methods import PAPER_METHODS
from experiments.harness.networks import KEEP, shared_runs
from experiments.harness.presets import PRESETS, Preset, choose_preset
from rebasin.errors import ConfigError, RebasinError
from rebasin.files import explain
from rebasin.training.data import load_dataset
from rebasin.training.folders import expand_home
from rebasin.training.imp import Rewind

__all__ = [
    "INTERRUPTED",
    "Choice",
    "choose",
    "choose_epochs",
    "chosen_connectivity",
    "choose_epochs_with_last",
    "chosen_methods",
    "chosen_pruning",
    "define_connectivity_flags",
    "define_flags",
    "define_pruning_flags",
    "run_binary",
]

_MODELS = "; ".join(f"{', '.join(models)} ({name})" for name, models in PRESETS.items())

_PRESET = flags.DEFINE_enum(
    "preset",
    "digits",
    list(PRESETS),
    "What fills in every flag that is not given: demo (a minute), digits (minutes), cpu (minutes to an hour "
    "and more), paper (the full recipe, for an accelerator).",
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for results.json, the CSV and the figures; must be given."
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir",
    None,
    "Folder of trained networks, found again by recipe and seed. By default OUTPUT_DIR/runs for the "
    "presets demo and digits, else $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first network; the others follow.", lower_bound=0)
_REPLICATES = flags.DEFINE_integer("replicates", None, "Independent pairs of networks.", lower_bound=1)
_DATASET = flags.DEFINE_string("dataset", None, "digits, mnist, cifar10, cifar100 or svhn_cropped.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets."
)
_MODEL = flags.DEFINE_string(
    "model", None, f"A model for which the preset has a recipe, by default the first: {_MODELS}."
)
_NUM_TRAIN = flags.DEFINE_integer(
    "num_train",
    None,
    "Training examples, in the mix of classes of all; by default the preset's.",
    lower_bound=1,
)
_WIDTH = flags.DEFINE_integer("width", None, "Width of the model.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", None, "Epochs of training.", lower_bound=1)
_WARMUP_EPOCHS = flags.DEFINE_integer(
    "warmup_epochs",
    None,
    "Epochs of learning rate warm-up; by default those of the recipe, all EPOCHS if these are fewer.",
    lower_bound=0,
)
_RESUME = flags.DEFINE_bool("resume", False, "Go on with an unfinished run in OUTPUT_DIR.")
_NUM_ALPHAS = flags.DEFINE_integer(
    "num_alphas", None, "Points on each path, both ends included.", lower_bound=2
)
_NUM_EVAL = flags.DEFINE_integer(
    "num_eval", None, "Examples of each split on which paths are measured.", lower_bound=1
)
_ALGORITHM = flags.DEFINE_enum(
    "algorithm",
    None,
    list(ALGORITHMS),
    "How weights and activations are matched: paper (Algorithm 1 of arXiv 2404.06498 for weights, and "
    "activations on all training data) or best (this project's defaults); by default the preset's.",
)
_NUM_MATCH = flags.DEFINE_integer(
    "num_match",
    None,
    "Training examples for matching methods that need data; by default the preset's, and all with "
    "--algorithm=paper.",
    lower_bound=1,
)
_KEEP_CHECKPOINTS = flags.DEFINE_enum(
    "keep_checkpoints",
    None,
    list(KEEP),
    "What stays on disk of the networks that this run trains: "
    + "; ".join(f"{name}: {what}" for name, what in KEEP.items())
    + ".",
)
_SHARED = tuple(flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]))

# Exit status after Ctrl-C, as shells have it: 128 and the number of the signal.
INTERRUPTED = 130

# Presets whose networks are so small that they stay beside the results.
_SMALL = ("demo", "digits")


class Choice(NamedTuple):
    """What the shared flags say about a config.

    Attributes:
      preset: what fills in flags that are not given.
      fields: the fields of `experiments.harness.experiment.Config`, by name.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    preset: Preset
    fields: dict[str, Any]
    num_eval: int | None

    @property
    def last(self) -> int:
        """The last epoch of training."""
        return self.fields["recipe"].epochs


def define_flags(
    binary: str,
    *,
    methods: bool = False,
    strict: bool = False,
    time_limit: bool = False,
    merge: bool = False,
) -> None:
    """List the shared flags in the help of a binary, and give it the flags that only some binaries have.

    Two binaries may be imported in one process, as tests do; a flag that both have is defined once.

    Args:
      binary: ``__name__`` of the binary's module.
      methods: whether the binary has ``--methods``, see `chosen_methods`.
      strict: whether the binary makes claims and has ``--strict``.
      time_limit: whether the binary has ``--time_limit``.
      merge: whether the binary has ``--merge``.
    """
    if methods and "methods" not in flags.FLAGS:
        flags.DEFINE_list(
            "methods",
            None,
            f"Matching methods, in the order of the figures, among {', '.join(rebasin.METHODS)}; by default "
            "weights and activations, in compare_methods all.",
        )
    if strict and "strict" not in flags.FLAGS:
        flags.DEFINE_bool("strict", False, "Exit with status 1 if a claim does not hold.")
    if time_limit and "time_limit" not in flags.FLAGS:
        flags.DEFINE_float(
            "time_limit",
            None,
            "Seconds after which the run must have ended. It stops between two steps when another might not "
            "end in time, draws what it has, and goes on with --resume.",
            lower_bound=1,
        )
    if merge and "merge" not in flags.FLAGS:
        flags.DEFINE_bool(
            "merge",
            False,
            "Measure nothing; combine the results.json files that follow, of runs that differ in nothing but "
            "their seeds, into one in OUTPUT_DIR.",
        )
    own = {"methods": methods, "strict": strict, "time_limit": time_limit, "merge": merge}
    # absl files the flags of the main module under the name of the program.
    module = sys.argv[0] if binary == "__main__" else binary
    for name in (*_SHARED, *(name for name, has in own.items() if has)):
        flags.FLAGS.register_key_flag_for_module(module, flags.FLAGS[name])


def define_pruning_flags(binary: str, *, rewind: bool = True) -> None:
    """Give a binary the flags of iterative magnitude pruning, see `chosen_pruning`.

    Args:
      binary: ``__name__`` of the binary's module.
      rewind: whether the binary has ``--rewind``; without it weights are rewound.
    """
    if "levels" not in flags.FLAGS:
        text = "Levels of pruning, each of which prunes a fifth of the remaining weights."
        flags.DEFINE_integer("levels", 15, text, lower_bound=1)
        text = "Epoch to which every level returns before it is trained."
        flags.DEFINE_integer("rewind_epoch", 5, text, lower_bound=0)
    if rewind and "rewind" not in flags.FLAGS:
        text = "What returns to it: the weights, or the learning rate alone."
        flags.DEFINE_enum("rewind", "weights", get_args(Rewind), text)
    module = sys.argv[0] if binary == "__main__" else binary
    for name in ("levels", "rewind_epoch", *(("rewind",) if rewind else ())):
        flags.FLAGS.register_key_flag_for_module(module, flags.FLAGS[name])


def chosen_pruning(*, rewind: bool = True) -> dict[str, Any]:
    """Return the values of the flags of pruning, by name.

    Args:
      rewind: as in `define_pruning_flags`.
    """
    values = {name: flags.FLAGS[name].value for name in ("levels", "rewind_epoch")}
    return values | {"rewind": flags.FLAGS["rewind"].value if rewind else "weights"}


def define_widths_flag(binary: str) -> None:
    """Give a binary ``--widths``, see `chosen_widths`.

    Args:
      binary: ``__name__`` of the binary's module.
    """
    if "widths" not in flags.FLAGS:
        flags.DEFINE_list(
            "widths", None, "Widths of the networks, ascending; by default those of the preset and --width."
        )
    module = sys.argv[0] if binary == "__main__" else binary
    flags.FLAGS.register_key_flag_for_module(module, flags.FLAGS["widths"])


def chosen_widths(default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the widths that were given, or else `default`.

    Raises:
      ConfigError: they are not numbers.
    """
    given = flags.FLAGS["widths"].value
    try:
        return default if given is None else tuple(map(int, given))
    except ValueError:
        raise ConfigError(f"wanted widths, such as 16,32,64, got {','.join(given or ())!r}") from None


def define_connectivity_flags(binary: str) -> None:
    """Give a binary the flags of networks that are aligned together over widths, see `chosen_connectivity`.

    Args:
      binary: ``__name__`` of the binary's module.
    """
    define_widths_flag(binary)
    if "joint" not in flags.FLAGS:
        names = ", ".join(JOINT)
        text = f"Algorithms that align all networks of a replicate together, among {names}; empty for none."
        flags.DEFINE_list("joint", list(JOINT), text)
        text = "Gradient steps of all_pairs."
        flags.DEFINE_integer("joint_steps", 50, text, lower_bound=1)
        text = "Test error barrier, a fraction, up to which two networks are connected."
        flags.DEFINE_float("connected_at_most", 0.02, text, lower_bound=0)
        text = "Test loss barrier, in nats, up to which two networks are connected."
        flags.DEFINE_float("loss_at_most", 0.1, text, lower_bound=0)
    module = sys.argv[0] if binary == "__main__" else binary
    for name in ("joint", "joint_steps", "connected_at_most", "loss_at_most"):
        flags.FLAGS.register_key_flag_for_module(module, flags.FLAGS[name])


def chosen_connectivity(choice: "Choice") -> dict[str, Any]:
    """Return the fields of `experiments.harness.connectivity.ConnectivityConfig`, by name.

    Raises:
      ConfigError: the widths are not numbers.
    """
    preset = (_WIDTH.value,) if _WIDTH.value else choice.preset.widths or (choice.fields["recipe"].width,)
    widths = chosen_widths(preset)
    # The recipe has the first width, so that one list of widths is one config.
    recipe = (
        dataclasses.replace(choice.fields["recipe"], width=widths[0]) if widths else choice.fields["recipe"]
    )
    return {
        **choice.fields,
        "recipe": recipe,
        "methods": chosen_methods(PAPER_METHODS),
        "widths": widths,
        "num_eval": choice.num_eval,
        **{name: flags.FLAGS[name].value for name in ("joint_steps", "connected_at_most", "loss_at_most")},
        "joint": tuple(flags.FLAGS["joint"].value or ()),
    }


def chosen_methods(default: Sequence[str]) -> tuple[str, ...]:
    """Return the matching methods of ``--methods``, or those of a default."""
    return tuple(flags.FLAGS["methods"].value or default)


def choose(regime: str = "trajectory", *, replicates: int | None = None) -> Choice:
    """Read the shared flags.

    Args:
      regime: regime of the recipe, a name in `rebasin.training.recipes.REGIMES`.
      replicates: number of pairs where ``--replicates`` is not given; `None` for the preset's.

    Raises:
      ConfigError: the preset lacks the model, or the recipe cannot work.
    """
    preset = choose_preset(_PRESET.value, _MODEL.value)
    changes = {"dataset": _DATASET.value, "num_train": _NUM_TRAIN.value, "width": _WIDTH.value}
    warmup, epochs = _WARMUP_EPOCHS.value, _EPOCHS.value
    if warmup is None and epochs is not None:
        # A short trial asks for few epochs and should not have to name a shorter warm-up as well.
        warmup = min(preset.build_recipe(regime).warmup_epochs, epochs)
    recipe = preset.build_recipe(regime, **changes, epochs=epochs, warmup_epochs=warmup)
    algorithm = _ALGORITHM.value or preset.algorithm
    num_match = None if algorithm == PAPER_ALGORITHM else preset.num_match
    fields = {
        "recipe": recipe,
        "replicates": _REPLICATES.value or replicates or preset.replicates,
        "seed": _SEED.value,
        "num_alphas": _NUM_ALPHAS.value or preset.num_alphas,
        "num_match": _NUM_MATCH.value or num_match,
        "algorithm": algorithm,
    }
    return Choice(preset, fields, _NUM_EVAL.value or preset.num_eval)


def choose_epochs(given: Sequence[str] | None, preset: Sequence[int] | None, last: int) -> tuple[int, ...]:
    """Return the epochs of a flag, or those epochs of a preset that lie before the last one.

    Raises:
      ConfigError: the flag's value is not a list of numbers.
    """
    if given is None:
        return tuple(epoch for epoch in preset or range(last) if epoch < last)
    try:
        return tuple(int(epoch) for epoch in given)
    except ValueError:
        raise ConfigError(f"wanted epochs, such as 0,1,5, got {','.join(given)!r}") from None


def choose_epochs_with_last(given: Sequence[str] | None, preset: Sequence[int], last: int) -> tuple[int, ...]:
    """Return the epochs of a flag, or those of a preset, up to the last one, which is always among them.

    Raises:
      ConfigError: the flag's value is not a list of numbers.
    """
    chosen = {last, *choose_epochs(given, preset, last)}
    return tuple(sorted(chosen))


def run_binary(
    arguments: Sequence[str], experiment: Experiment[C, Any, Any], build_config: Callable[[], C]
) -> None:
    """Run an experiment once the flags are parsed; print what the user got wrong as one message on stderr.

    Args:
      arguments: the name of the program, and whatever is not a flag.
      experiment: what to run.
      build_config: reads the flags.
    """
    deadline = _given("time_limit") and Deadline(_given("time_limit"))
    merge = _given("merge")
    if len(arguments) > 1 and not merge:
        raise app.UsageError(f"unknown arguments {arguments[1:]}")
    if not flags.FLAGS["verbosity"].present:
        # Without this JAX reports on its backends.
        logging.set_verbosity(logging.WARNING)
    try:
        if merge:
            experiment.merge([pathlib.Path(name) for name in arguments[1:]], output_dir=_output_directory())
            return
        config = build_config()
        results = experiment.run(
            config,
            load_dataset(config.recipe.dataset, data_dir=_DATA_DIR.value),
            output_dir=_output_directory(),
            runs_dir=_runs_directory(),
            # 151 epochs of a VGG-16 of width 64, with momentum, are 18 GB.
            keep=_KEEP_CHECKPOINTS.value or ("ends" if _PRESET.value == "paper" else None),
            resume=_RESUME.value,
            deadline=deadline,
        )
    except RebasinError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {explain(error)}{_going_on()}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        sys.exit(f"error: out of memory; choose a smaller --width, --num_eval or --num_match{_going_on()}")
    except KeyboardInterrupt:
        print(f"interrupted{_going_on()}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    # Experiments without claims do not define the flag, but another binary of this process may have done so.
    if experiment.judge and flags.FLAGS["strict"].value and not all(claim.holds for claim in results.claims):
        sys.exit(1)


def _given(name: str) -> Any:
    """Return the value of a flag that only some binaries have, `None` where it is not defined."""
    return flags.FLAGS[name].value if name in flags.FLAGS else None


def _going_on() -> str:
    """Return what to say of the results in the output folder, nothing where there are none."""
    try:
        begun = (_output_directory() / "results.json").is_file()
    except (OSError, RebasinError):
        return ""
    return ". What was measured before is stored: go on with --resume" if begun else ""


def _output_directory() -> pathlib.Path:
    """Return the folder for results; a name that is missing or empty is a `ConfigError`."""
    if not _OUTPUT_DIR.value:
        raise ConfigError("--output_dir is empty; name a folder for results.json, the CSV and the figures")
    return expand_home(_OUTPUT_DIR.value)


def _runs_directory() -> pathlib.Path:
    """Return the folder of trained networks, by flag, environment and preset."""
    if _PRESET.value in _SMALL and not _RUNS_DIR.value:
        return _output_directory() / "runs"
    return shared_runs(_RUNS_DIR.value)
