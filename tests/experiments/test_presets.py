"""Presets: what each fills in."""

import pytest

from experiments.harness.presets import PRESETS, choose_preset
from rebasin.errors import ConfigError


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_recipes_and_end_at_their_last_epoch(name):
    for model, preset in PRESETS[name].items():
        recipe = preset.build_recipe("trajectory", width=None)
        assert recipe.model == model
        assert recipe.width == preset.recipe["width"]
        assert preset.epochs is None or preset.epochs[-1] == recipe.epochs
        assert preset.build_recipe("trajectory", epochs=7, width=9).epochs == 7
        assert set(preset.match_epochs) <= set(preset.epochs or range(recipe.epochs + 1))
        assert preset.match_epochs[-1] == recipe.epochs
        assert preset.widths == tuple(sorted(set(preset.widths)))
        assert max(preset.spawn_epochs) < preset.build_recipe("instability").epochs


def test_unknown_presets():
    with pytest.raises(ConfigError, match="no preset is called 'gpu'; there are demo, digits, cpu, paper"):
        choose_preset("gpu", None)
    with pytest.raises(
        ConfigError, match="preset 'digits' has no recipe for the model 'vgg16'; it has mlp, vit"
    ):
        choose_preset("digits", "vgg16")
