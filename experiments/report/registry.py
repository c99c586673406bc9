"""Which part of the papers is measured by which binary, and by which of its claims.

The only list of this kind. The report has a row for each `Part`, and a section for each `Binary`.
"""

from typing import NamedTuple

__all__ = ["BINARIES", "DATASETS", "MODELS", "PAPERS", "PARTS", "UNITS", "Binary", "Part", "unit_of"]

# What the papers are called in the report.
PAPERS = {
    "2404.06498": "Simultaneous linear connectivity of neural networks modulo permutation",
    "2310.19103": "Proving linear mode connectivity of neural networks via optimal transport",
    "2505.05143": "beyond the two papers",
}

# Models and datasets in words.
MODELS = {
    "mlp": "MLP",
    "vgg16": "VGG-16",
    "resnet20": "ResNet-20",
    "vit": "ViT",
    "vgg16_batchnorm": "VGG-16 (BatchNorm)",
    "resnet20_batchnorm": "ResNet-20 (BatchNorm)",
}
DATASETS = {
    "digits": "digits",
    "mnist": "MNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn_cropped": "SVHN",
}


class Binary(NamedTuple):
    """A program of this folder that has a `main`.

    Attributes:
      title: heading of its section.
      where: the section and appendices of the paper that it reproduces.
      figures: its figures, by name of the file, with what they show.
      writes: name of the binary as whose results its results are stored; empty where it writes none.
    """

    title: str
    where: str
    figures: dict[str, str]
    writes: str


class Part(NamedTuple):
    """A figure of the first paper, or a part of the second: a row of the first table.

    Attributes:
      label: number of the figure, or name of the part.
      paper: number of the paper in `PAPERS`.
      says: what the paper says or shows, with its number.
      evidence: for each binary that measures it, the beginnings of the ids of its claims; the first claim is
        the one whose number stands in the table.
      models: models and datasets of the paper's figure, as (model, dataset). Where there are results of one
        of these, results of other networks are left out of the row. Empty where all networks count.
    """

    label: str
    paper: str
    says: str
    evidence: dict[str, tuple[str, ...]]
    models: tuple[tuple[str, str], ...] = ()


BINARIES: dict[str, Binary] = {
    "training_trajectories": Binary(
        "One permutation aligns two training trajectories",
        "sections 5.1 and 6, appendices E and H.1",
        {
            "training_trajectories.png": "figures 1 left, 4, 8",
            "fixed_permutations.png": "figures 7, 8, 10, 15",
            "permutations.png": "distances, and the fixed points of figure 21",
        },
        "training_trajectories",
    ),
    "paper_pair": Binary(
        "One pair of the paper's networks, within a time limit",
        "sections 5.1 and 6, appendices E and H.1",
        {},
        "training_trajectories",
    ),
    "compare_algorithms": Binary(
        "Does a better algorithm find good permutations earlier?", "section 7, open question", {}, ""
    ),
    "sgd_instability": Binary(
        "The permutation of two networks aligns their children",
        "section 5.1",
        {"sgd_instability.png": "figures 1 right, 8 and 9 column 3"},
        "sgd_instability",
    ),
    "sparse_connectivity": Binary(
        "The permutation of two dense networks aligns their lottery tickets",
        "section 5.2, appendix F",
        {
            "sparse_connectivity.png": "figures 2 left, 11",
            "interpolated_sparsity.png": "figure 12",
        },
        "sparse_connectivity",
    ),
    "mask_transport": Binary(
        "A permutation carries lottery tickets to another network",
        "section 5.2, appendix F",
        {"mask_transport.png": "figures 2 right, 13"},
        "mask_transport",
    ),
    "strong_connectivity": Binary(
        "Is one permutation for each network enough?",
        "section 5.3, appendix G",
        {
            "strong_connectivity.png": "figures 3, 14",
            "joint_alignment.png": "all three networks aligned together",
            "widths.png": "the width from which on networks are connected",
        },
        "strong_connectivity",
    ),
    "weight_magnitude": Binary(
        "Weight matching depends on the large weights",
        "section 6, appendix H.2",
        {"weight_magnitude.png": "figures 5 left, 16"},
        "weight_magnitude",
    ),
    "layerwise_alignment": Binary(
        "Weight matching aligns lower layers earlier",
        "section 6, appendix H.3",
        {
            "layerwise_loss.png": "figures 5 right, 17",
            "layerwise_error.png": "figure 18",
            "fixed_points.png": "figure 21",
        },
        "layerwise_alignment",
    ),
    "stability_interventions": Binary(
        "Stability at initialisation is neither necessary nor sufficient",
        "section 6, appendix H.4",
        {"stability_interventions.png": "figures 6, 19, 20"},
        "stability_interventions",
    ),
    "loss_landscape": Binary(
        "The loss between two trajectories",
        "appendix I",
        {
            "landscape.png": "figure 22",
            "landscape_error.png": "figure 23, error",
            "landscape_loss.png": "figure 23, loss",
        },
        "loss_landscape",
    ),
    "transitivity": Binary(
        "Definitions of connectivity on several networks",
        "section 4, appendices B and C",
        {"transitivity.png": "barriers under each definition", "simplex.png": "averages of three networks"},
        "transitivity",
    ),
    "learning_rates": Binary(
        "Covariance against weight and activation matching",
        "arXiv 2310.19103, section 6",
        {"learning_rates.png": "loss at the midpoint by learning rate"},
        "learning_rates",
    ),
    "optimal_transport": Binary(
        "Effective dimension and dependence of neurons",
        "arXiv 2310.19103, sections 5 and 6",
        {
            "optimal_transport.png": "dimensions and barriers by learning rate",
            "correlations.png": "dimensions against losses over rates, widths, epochs and layers",
        },
        "optimal_transport",
    ),
    "width_scaling": Binary(
        "The width that networks need",
        "arXiv 2310.19103, sections 4 and 5",
        {
            "width_scaling.png": "barriers by width, and the width needed by inputs and depth",
            "width_bounds.png": "measured widths and the paper's bounds",
        },
        "width_scaling",
    ),
    "mask_transport_widths": Binary(
        "A ticket in another network's beginning, over widths",
        "beyond the papers, after arXiv 2505.05143",
        {"mask_transport_widths.png": "the gap to the network's own ticket"},
        "mask_transport_widths",
    ),
    "compare_methods": Binary(
        "All matching methods on the same networks",
        "beyond the papers; methods of arXiv 2209.04836, 2212.12042, 2310.19103, 2405.17897, 2211.08403",
        {"compare_methods.png": "barriers by method, with and without REPAIR"},
        "compare_methods",
    ),
    "reproduce": Binary("All of this in one command", "both papers", {}, ""),
}

_VGG, _RESNET = ("vgg16", "cifar10"), ("resnet20", "cifar10")
# The rows of figure 10.
_OTHER_DATA = (
    ("mlp", "mnist"),
    _RESNET,
    ("vgg16", "svhn_cropped"),
    ("resnet20", "svhn_cropped"),
    ("vgg16", "cifar100"),
    ("resnet20", "cifar100"),
)
_TRAJECTORY = (
    "one_permutation_aligns_every_epoch",
    "one_permutation_aligns_the_end",
    "early_permutations_fail",
)
_CHILDREN = ("parents_permutation", "onset_of_linear_connectivity", "unstable_at_first")
_TICKETS = (
    "dense_permutation_aligns_every_level",
    "dense_beats_sparse_permutation",
    "dense_permutation_helps_sparse_networks",
)
_MASKS = (
    "transported_masks_match_longer_than_one_shot",
    "transported_masks_beat_unpermuted_ones",
    "dense_permutation_carries_masks_better",
)
_LAYERS = ("between_end_and_early", "lower_layers_align_earlier", "input_layers_matter_more")


def _figure(label: str, says: str, /, *models: tuple[str, str], **evidence: tuple[str, ...]) -> Part:
    return Part(label, "2404.06498", says, evidence, models)


PARTS: tuple[Part, ...] = (
    _figure(
        "1 left",
        "One permutation from the end takes the barrier from about 70 % to 3–8 % at every epoch.",
        training_trajectories=("one_permutation_aligns_every_epoch", "unaligned_barrier"),
    ),
    _figure(
        "1 right",
        "That permutation aligns children from the onset of linear connectivity on, around epoch 5 of 150.",
        sgd_instability=_CHILDREN,
    ),
    _figure(
        "2 left",
        "The dense permutation aligns the tickets at every level, better than matching the tickets.",
        sparse_connectivity=_TICKETS,
    ),
    _figure(
        "2 right",
        "A permuted mask trains to the dense accuracy to level 12 (6.8 % of the weights), longer than "
        "one-shot pruning.",
        mask_transport=_MASKS,
    ),
    _figure(
        "3",
        "The barrier through a third network falls with width, and stays far above direct alignment.",
        strong_connectivity=("indirect_barrier_falls", "indirect_above_direct"),
    ),
    _figure(
        "4",
        "P_end aligns every epoch (6 % at the end, at most 9 %), where P_t fails early in training.",
        training_trajectories=(
            "one_permutation_aligns_the_end",
            "one_permutation_aligns_every_epoch",
            "early_permutations_are_worse_in_place",
        ),
    ),
    _figure(
        "5 left",
        "Weight matching bears pruning of the small weights, and not of as many random ones.",
        weight_magnitude=("random_pruning_harms_more", "small_weights_do_not_matter"),
    ),
    _figure(
        "5 right",
        "Rewound bottom-up, the lowest layers are aligned sooner than the higher ones.",
        layerwise_alignment=("lower_layers_align_earlier",),
    ),
    _figure(
        "6",
        "Stability at initialisation is neither sufficient nor necessary for alignment.",
        stability_interventions=("first_regime", "second_regime"),
    ),
    _figure(
        "7",
        "Activation matching finds a permutation for the end earlier in training.",
        training_trajectories=(
            "activations_succeed_earlier",
            "one_permutation_aligns_every_epoch_activations",
            "one_permutation_aligns_the_end_activations",
            "early_permutations_fail_activations",
        ),
    ),
    _figure(
        "8",
        "Weight matching on VGG-16: P_3 leaves a train error barrier of .89 at the end, P_150 .08.",
        _VGG,
        training_trajectories=("early_permutations_fail_weights", *_TRAJECTORY[:2]),
        sgd_instability=_CHILDREN,
    ),
    _figure(
        "9",
        "The same on ResNet-20: P_5 leaves .78 at the end, P_20 .24, P_50 .09.",
        _RESNET,
        training_trajectories=("early_permutations_fail_weights", *_TRAJECTORY[:2]),
        sgd_instability=_CHILDREN,
    ),
    _figure(
        "10",
        "The same on MNIST, CIFAR-10, SVHN and CIFAR-100 with MLP, VGG-16 and ResNet-20.",
        *_OTHER_DATA,
        training_trajectories=(
            "one_permutation_aligns_every_epoch_weights",
            "early_permutations_fail_weights",
        ),
    ),
    _figure(
        "11",
        "The dense permutation aligns tickets on VGG-16 and ResNet-20, on training and test data.",
        sparse_connectivity=_TICKETS,
    ),
    _figure(
        "12",
        "The same over the sparsity of the interpolated network.",
        sparse_connectivity=("dense_permutation_helps_sparse_networks",),
    ),
    _figure(
        "13",
        "Transported masks by both matchings, and with learning-rate rewinding.",
        mask_transport=_MASKS,
    ),
    _figure(
        "14",
        "As figure 3, with losses, errors and fixed points: width does not make direct and indirect "
        "permutations more alike.",
        strong_connectivity=("no_more_fixed_points", "indirect_barrier_falls", "indirect_above_direct"),
    ),
    _figure(
        "15",
        "P_t is closer to A_t in Euclidean distance early in training, and yet its barrier is higher.",
        training_trajectories=(
            "early_permutations_are_closer",
            "early_permutations_are_worse_in_place",
            "early_permutations_fail_weights",
        ),
    ),
    _figure(
        "16",
        "The same as figure 5 left by epoch: more can be pruned from later networks.",
        weight_magnitude=(
            "more_can_be_pruned_late",
            "random_pruning_harms_more",
            "small_weights_do_not_matter",
        ),
    ),
    _figure(
        "17",
        "Loss barriers of partly rewound networks lie between those of P_end and P_t.",
        layerwise_alignment=_LAYERS,
    ),
    _figure("18", "The same for error barriers.", layerwise_alignment=_LAYERS),
    _figure(
        "19",
        "Regime 1 is stable at initialisation, and neither matching aligns its networks.",
        stability_interventions=("first_regime_cannot_be_aligned", "first_regime_is_stable"),
    ),
    _figure(
        "20",
        "Regime 2 is not stable at initialisation, and activation matching connects whole trajectories.",
        stability_interventions=("second_regime_can_be_aligned", "second_regime_is_unstable"),
    ),
    _figure(
        "21",
        "P_t agrees with P_end on more units of the lower layers, earlier in training.",
        layerwise_alignment=("lower_layers_have_more_fixed_points",),
    ),
    _figure(
        "22",
        "Under early permutations a ridge separates the trajectories; under late ones there is none.",
        loss_landscape=("ridge_sinks_with_the_match_epoch", "ridge_vanishes"),
    ),
    _figure(
        "23",
        "The same on further planes.",
        loss_landscape=("ridge_vanishes", "ridge_sinks_with_the_match_epoch"),
    ),
    Part(
        "definitions, appendices B and C",
        "2404.06498",
        "Weak, simultaneous and strong connectivity; whether connectivity is transitive is left open.",
        {
            "transitivity": (
                "weak_connectivity_is_transitive",
                "all_networks_are_strongly_connected",
                "average_is_as_good_as_one",
            )
        },
    ),
    Part(
        "section 4",
        "2310.19103",
        "Two two-layer networks of width of order √d/ε are connected with probability 1 − ε.",
        {"width_scaling": ("wide_two_layer_networks_connect", "width_grows_no_faster_with_")},
    ),
    Part(
        "section 5, depth",
        "2310.19103",
        "The width that deep networks need grows exponentially with depth, less so in low dimension.",
        {"width_scaling": ("depth_multiplies_the_width",)},
    ),
    Part(
        "sections 5 and 6, dimension",
        "2310.19103",
        "The effective dimension of the neurons goes with the barrier over learning rates.",
        {"optimal_transport": ("dimension_goes_with_loss", "dimension_")},
    ),
    Part(
        "section 6, matching",
        "2310.19103",
        "Covariance matching beats weight matching by 0.80 nats at low learning rates, and activation "
        "matching beats it by 0.10.",
        {"learning_rates": ("covariance_better_than_weights", "activations_better_than_covariance")},
    ),
    Part(
        "tickets over widths",
        "2505.05143",
        "The gap between a transported ticket and the network's own shrinks with width.",
        {"mask_transport_widths": ("gap_shrinks_with_width", "transported_masks_beat_unpermuted_ones")},
    ),
)

# The unit of a claim's number, by binary and beginning of the claim's id. "%" and "points" are fractions in
# the file, and are shown times 100.
_POINTS, _PERCENT, _NATS = "points", "%", "nats"
UNITS: dict[tuple[str, str], str] = {
    ("training_trajectories", "unaligned_barrier"): _PERCENT,
    ("training_trajectories", "one_permutation_aligns"): _PERCENT,
    ("training_trajectories", "early_permutations_fail"): _POINTS,
    ("training_trajectories", "early_permutations_are_closer"): _PERCENT,
    ("training_trajectories", "early_permutations_are_worse_in_place"): _POINTS,
    ("training_trajectories", "activations_succeed_earlier"): _POINTS,
    ("sgd_instability", "unstable_at_first"): _PERCENT,
    ("sgd_instability", "onset_of_linear_connectivity"): "epochs",
    ("sgd_instability", "parents_permutation"): _POINTS,
    ("sparse_connectivity", "dense_permutation_aligns_every_level"): _PERCENT,
    ("sparse_connectivity", "dense_"): _POINTS,
    ("mask_transport", "transported_masks_match_longer_than_one_shot"): "levels",
    ("mask_transport", "transported_masks_beat"): _POINTS,
    ("mask_transport", "dense_permutation_carries_masks_better"): _POINTS,
    ("mask_transport_widths", "gap_shrinks_with_width"): _POINTS,
    ("mask_transport_widths", "transported_masks_beat"): _POINTS,
    ("strong_connectivity", "indirect_"): _NATS,
    ("strong_connectivity", "no_more_fixed_points"): _POINTS,
    ("strong_connectivity", "joint_alignment_reaches_direct"): "times",
    ("strong_connectivity", "temperature_connects_unaligned_networks"): _NATS,
    ("transitivity", "weak_connectivity_is_transitive"): _PERCENT,
    ("transitivity", "all_networks_are_strongly_connected"): _PERCENT,
    ("transitivity", "average_is_as_good_as_one"): _POINTS,
    ("weight_magnitude", "more_can_be_pruned_late"): _POINTS,
    ("weight_magnitude", ""): _POINTS,
    ("layerwise_alignment", "between_end_and_early"): _PERCENT,
    ("layerwise_alignment", "lower_layers_align_earlier"): "epochs",
    ("layerwise_alignment", "input_layers_matter_more"): _POINTS,
    ("layerwise_alignment", "lower_layers_have_more_fixed_points"): _POINTS,
    ("stability_interventions", ""): _PERCENT,
    ("loss_landscape", "ridge_vanishes"): _PERCENT,
    ("loss_landscape", "ridge_sinks_with_the_match_epoch"): _POINTS,
    ("learning_rates", ""): _NATS,
    ("optimal_transport", "dimension_goes_with_loss"): "rank correlation",
    ("optimal_transport", "dimension_"): "dimensions",
    ("width_scaling", "wide_two_layer_networks_connect"): _NATS,
    ("width_scaling", "width_grows_no_faster_with_"): "exponent",
    ("width_scaling", "depth_multiplies_the_width"): "times",
}


def unit_of(binary: str, claim: str) -> str:
    """Return the unit of a claim's number: of all entries that fit, that with the longest beginning.

    Args:
      binary: name of the binary.
      claim: id of the claim.

    Raises:
      KeyError: no entry of `UNITS` fits.

    Examples:
      >>> unit_of("sparse_connectivity", "dense_beats_sparse_permutation_weights")
      'points'
    """
    fitting = [begin for name, begin in UNITS if name == binary and claim.startswith(begin)]
    if not fitting:
        raise KeyError(f"no unit for the claim {claim!r} of {binary}: give it a line in UNITS")
    return UNITS[binary, max(fitting, key=len)]
