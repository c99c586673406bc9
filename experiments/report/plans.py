"""What `reproduce` runs at each preset: sections, ordered so that later ones find the networks of earlier.

A section is a binary with flags. All sections of a preset have the same `--runs_dir`, so that a network is
trained once and found by its recipe. Sections that need a network whole come before those that need a few of
its epochs, since a network that is stored in part is not completed.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["PLANS", "SEED", "Section"]

# Results are reported on seeds that had no part in the choice of a recipe.
SEED = 100

_ALL = "--keep_checkpoints=all"


class Section(NamedTuple):
    """A binary with flags.

    Attributes:
      name: name of its folder of results.
      binary: name of the binary.
      flags: its flags beside preset, seed and folders.
      seconds: processor seconds that it took, with the networks of earlier sections there; `None` where that
        was not measured.
    """

    name: str
    binary: str
    flags: tuple[str, ...] = ()
    seconds: float | None = None


def _digits(times: Mapping[str, float]) -> tuple[Section, ...]:
    """Return the sections of the digits: the fewest replicates, alphas and levels that still tell."""
    flags: dict[str, tuple[str, ...]] = {
        "training_trajectories": (
            "--num_alphas=9",
            "--record_epochs=0,1,2,3,5,7,10,14,20,30",
            "--match_epochs=1,3,10,30",
        ),
        "layerwise_alignment": ("--num_alphas=9", "--rewind_epochs=1,3,5,10"),
        "weight_magnitude": (
            "--num_alphas=9",
            "--prune_epochs=1,3,10",
            "--fractions=0,0.4,0.8,0.9,0.95",
        ),
        "loss_landscape": ("--num_alphas=9", "--grid_size=25"),
        "sparse_connectivity": ("--num_alphas=9", "--replicates=3"),
        "mask_transport": (
            "--methods=weights",
            "--levels=18",
            "--matching_margin=0.02",
            "--replicates=3",
        ),
        "mask_transport_widths": ("--widths=16,128", "--levels=12", "--replicates=3"),
        "sgd_instability": ("--num_alphas=9", "--spawn_epochs=0,1,3,10,20", "--replicates=3"),
        "stability_interventions": ("--num_alphas=9", "--replicates=3"),
        "strong_connectivity": (
            _ALL,
            "--widths=16,64,128",
            "--joint_steps=10",
            "--num_alphas=9",
            "--replicates=3",
        ),
        "transitivity": (_ALL, "--widths=16,64", "--joint_steps=10", "--num_alphas=9", "--replicates=2"),
        "learning_rates": ("--num_alphas=5", "--rates=0.0004,0.0016,0.025,0.1"),
        "optimal_transport": ("--num_alphas=5", "--rates=0.0004,0.0016,0.025,0.1"),
        "width_scaling": ("--num_alphas=9", "--replicates=2"),
        "compare_methods": ("--num_alphas=9", "--num_steps=20", "--replicates=2"),
    }
    trajectories = flags["training_trajectories"]
    sections = [
        Section("training_trajectories", "training_trajectories", trajectories),
        Section("training_trajectories_paper", "training_trajectories", (*trajectories, "--algorithm=paper")),
        *(Section(name, name, own) for name, own in flags.items() if name != "training_trajectories"),
    ]
    return tuple(section._replace(seconds=times.get(section.name)) for section in sections)


def _small(sections: tuple[Section, ...]) -> tuple[Section, ...]:
    """Return sections in miniature, which show that everything runs and say little."""
    changes = {
        "--num_alphas": "5",
        "--levels": "4",
        "--fractions": "0,0.5,0.9",
        "--grid_size": "11",
        "--spawn_epochs": "0,3",
        "--num_steps": "5",
        "--joint_steps": "3",
        "--rates": "0.01,0.1",
        "--widths": "16,32",
    }

    def shrunk(flag: str) -> str:
        name, _, value = flag.partition("=")
        return f"{name}={changes.get(name, value)}"

    def few(flags: tuple[str, ...]) -> tuple[str, ...]:
        return *(shrunk(flag) for flag in flags if not flag.startswith("--replicates")), "--replicates=2"

    return tuple(section._replace(flags=few(section.flags), seconds=None) for section in sections)


def _with_defaults(name: str, *binaries: tuple[str, tuple[str, ...]]) -> tuple[Section, ...]:
    return tuple(Section(f"{name}_{binary}", binary, flags) for binary, flags in binaries)


def _cpu() -> tuple[Section, ...]:
    """Return the sections of MNIST, as the pages of the experiments run them."""
    some = ("--num_eval=2000", "--num_alphas=13")
    trajectories = ("--num_eval=2000",)
    return (
        Section("mnist_mlp", "training_trajectories", trajectories),
        Section("mnist_mlp_paper", "training_trajectories", (*trajectories, "--algorithm=paper")),
        *_with_defaults(
            "mnist_mlp",
            ("layerwise_alignment", some),
            ("weight_magnitude", some),
            ("loss_landscape", (*some, "--replicates=3", "--grid_size=31")),
            ("sparse_connectivity", ("--replicates=3", "--levels=12", *some)),
            ("mask_transport", ("--replicates=3", "--levels=12", *some, "--methods=weights")),
            ("sgd_instability", ("--replicates=3", *some)),
            ("stability_interventions", ("--replicates=3", *some)),
            ("strong_connectivity", (_ALL, "--replicates=3", *some)),
            ("transitivity", (_ALL, "--replicates=2", *some, "--widths=32,128")),
            ("learning_rates", ("--epochs=10", "--num_alphas=13")),
            ("optimal_transport", ("--epochs=10", "--num_alphas=13")),
            (
                "width_scaling",
                (*some, "--num_train=20000", "--epochs=10", "--replicates=4"),
            ),
            ("compare_methods", (*some, "--num_match=2000", "--num_steps=25")),
        ),
        Section("cifar10_vgg16", "training_trajectories", ("--model=vgg16", "--num_alphas=13")),
    )


def _paper() -> tuple[Section, ...]:
    """Return all of the paper at full size, then the other paper's comparison on an MLP."""
    sections = []
    for model in ("vgg16", "resnet20"):
        one = f"--model={model}"
        sections += [
            Section(model, "training_trajectories", (one, _ALL)),
            Section(f"{model}_best", "training_trajectories", (one, _ALL, "--algorithm=best")),
            *_with_defaults(
                model,
                ("layerwise_alignment", (one, _ALL)),
                ("weight_magnitude", (one, _ALL)),
                ("loss_landscape", (one, _ALL)),
                ("sparse_connectivity", (one, _ALL)),
                ("mask_transport", (one, _ALL)),
            ),
            Section(
                f"{model}_mask_transport_rate",
                "mask_transport",
                (one, _ALL, "--rewind=learning_rate"),
            ),
            *_with_defaults(
                model,
                ("sgd_instability", (one,)),
                ("stability_interventions", (one,)),
                ("strong_connectivity", (one,)),
            ),
        ]
    # The other rows of figure 10.
    for model, dataset in (
        ("mlp", "mnist"),
        ("vgg16", "svhn_cropped"),
        ("resnet20", "svhn_cropped"),
        ("vgg16", "cifar100"),
        ("resnet20", "cifar100"),
    ):
        own = (f"--model={model}", f"--dataset={dataset}", "--methods=weights")
        sections.append(Section(f"{dataset}_{model}", "training_trajectories", own))
    mlp = ("--model=mlp",)
    return (
        *sections,
        *_with_defaults(
            "mlp",
            ("transitivity", mlp),
            ("learning_rates", mlp),
            ("optimal_transport", mlp),
            ("width_scaling", mlp),
        ),
        *_with_defaults("vgg16", ("mask_transport_widths", ("--model=vgg16", "--replicates=3"))),
        *_with_defaults("vgg16", ("compare_methods", ("--model=vgg16", _ALL))),
    )


# Processor seconds of each section of the digits, measured on one core of a machine that was busy otherwise.
# Networks that an earlier section trains are counted there.
_DIGITS_SECONDS: dict[str, float] = {
    "training_trajectories": 53,
    "training_trajectories_paper": 34,
    "layerwise_alignment": 26,
    "weight_magnitude": 28,
    "loss_landscape": 29,
    "sparse_connectivity": 59,
    "mask_transport": 119,
    "mask_transport_widths": 90,
    "sgd_instability": 30,
    "stability_interventions": 45,
    "strong_connectivity": 85,
    "transitivity": 56,
    "learning_rates": 60,
    "optimal_transport": 45,
    "compare_methods": 33,
}

_OF_DIGITS = _digits(_DIGITS_SECONDS)

PLANS: Mapping[str, tuple[Section, ...]] = MappingProxyType(
    {"demo": _small(_OF_DIGITS), "digits": _OF_DIGITS, "cpu": _cpu(), "paper": _paper()}
)
