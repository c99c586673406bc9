import dataclasses

import pytest

from rebasin.errors import ConfigError
from rebasin.training.recipes import REGIMES, Recipe, build_recipe, recipe_fields


def test_every_bad_field_is_listed():
    with pytest.raises(ConfigError) as info:
        Recipe(
            "digits",
            "mlp",
            width=0,
            epochs=3,
            num_train=0,
            batch_size=-1,
            peak_learning_rate=float("nan"),
            momentum=1.0,
            warmup_epochs=5,
            weight_decay=-1e-4,
            warmup_steps=-2,
            optimizer="lion",
        )
    assert str(info.value).splitlines() == [
        "this recipe cannot work:",
        "  width: wanted at least 1, got 0",
        "  batch_size: wanted at least 1, got -1",
        "  num_train: wanted at least 1, got 0",
        "  warmup_epochs: wanted between 0 and epochs (3), got 5",
        "  warmup_steps: wanted at least 0, got -2",
        "  peak_learning_rate: wanted a positive number, got nan",
        "  momentum: wanted at least 0 and less than 1, got 1.0",
        "  weight_decay: wanted a number of at least 0, got -0.0001",
        "  optimizer: wanted one of sgd, adam, got 'lion'",
    ]


@pytest.mark.parametrize(
    ("regime", "decay", "warmup", "peak"),
    [
        ("trajectory", 1e-4, 5, 0.1),
        ("instability", 0.0, 1, 0.1),
        ("remaining", 1e-4, 1, 0.1),
        ("stability_1", 1e-4, 0, 1e-3),
        ("stability_2", 0.0, 1, 0.1),
    ],
)
def test_regimes_are_the_papers(regime, decay, warmup, peak):
    recipe = build_recipe(regime, dataset="mnist", model="mlp", width=512)
    assert recipe == Recipe(
        "mnist",
        "mlp",
        512,
        150,
        None,
        128,
        peak,
        0.9,
        warmup_epochs=warmup,
        weight_decay=decay,
        augment=False,
    )


def test_every_regime_is_tested():
    names = {"trajectory", "instability", "remaining", "stability_1", "stability_2", "optimal_transport"}
    assert set(REGIMES) == names


def test_the_regime_of_the_optimal_transport_paper():
    recipe = build_recipe("optimal_transport", dataset="mnist", model="mlp", width=512, epochs=10)
    assert (recipe.warmup_epochs, recipe.warmup_steps, recipe.weight_decay) == (0, 10, 0.0)
    assert (recipe.optimizer, recipe.momentum) == ("sgd", 0.9)


def test_later_fields_are_written_where_they_are_used_alone():
    """Else a network that was stored before they were added would not be found again."""
    recipe = Recipe("digits", "mlp", width=8, epochs=3, warmup_epochs=1)
    assert set(recipe_fields(recipe)) == {
        "dataset",
        "model",
        "width",
        "epochs",
        "num_train",
        "batch_size",
        "peak_learning_rate",
        "momentum",
        "warmup_epochs",
        "weight_decay",
        "augment",
    }
    adam = dataclasses.replace(recipe, optimizer="adam", warmup_steps=10)
    assert Recipe(**recipe_fields(adam)) == adam


def test_augmentation_follows_the_dataset_unless_told():
    def augment(dataset, **changes):
        return build_recipe("trajectory", dataset=dataset, model="vgg16", width=8, **changes).augment

    assert [augment(name) for name in ("cifar10", "cifar100", "mnist", "svhn_cropped", "digits")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert augment("cifar10_16x16")
    assert not augment("mnist_7x7")
    assert not augment("cifar10", augment=False)


def test_changes_win_over_the_regime():
    recipe = build_recipe("trajectory", dataset="digits", model="mlp", width=8, epochs=3, warmup_epochs=1)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay) == (3, 1, 1e-4)


def test_unknown_regime():
    with pytest.raises(ConfigError) as info:
        build_recipe("fast", dataset="digits", model="mlp", width=8)
    assert str(info.value) == (
        "no regime is called 'fast'; there are trajectory, instability, remaining, stability_1, stability_2, "
        "optimal_transport"
    )
