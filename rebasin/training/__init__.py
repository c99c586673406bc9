"""Everything that trains networks: data, recipes, the training loop, and trajectories on disk.

The names below are what most programs need. Others are imported from the module that defines them.
"""

from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply, train
from rebasin.training.recipes import Recipe, build_recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["Recipe", "Trajectory", "build_apply", "build_recipe", "load_dataset", "train"]
