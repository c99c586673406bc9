"""Public models with small sizes and random weights, built from the packages that people install.

Models have two layers where their classes let that be chosen. Packages are imported when a model is built,
since nothing else in the project needs them; the extra ``rebasin-jax[public-models]`` pins them. Weights are
drawn by the initialisers of the packages.
"""

from collections.abc import Callable

from benchmarks.public_zoo import (
    diffusers_flax,
    equinox_zoos,
    flax_zoos,
    haiku_zoos,
    transformers_flax,
)
from benchmarks.public_zoo.specimen import Specimen

__all__ = ["PACKAGES", "Specimen"]

# Builders of models, by the name of the package on PyPI and the name of the model.
PACKAGES: dict[str, dict[str, Callable[[], Specimen]]] = {
    "transformers": transformers_flax.BUILDERS,
    "diffusers": diffusers_flax.BUILDERS,
    "equimo": equinox_zoos.EQUIMO,
    "pdequinox": equinox_zoos.PDEQUINOX,
    "flowjax": equinox_zoos.FLOWJAX,
    "dm-haiku": haiku_zoos.HAIKU,
    "jraph": haiku_zoos.JRAPH,
    "recurrentgemma": flax_zoos.RECURRENTGEMMA,
    "flaxmodels": flax_zoos.FLAXMODELS,
    "flax": flax_zoos.FLAX,
}
