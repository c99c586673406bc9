"""Packaging of rebasin; the distribution is called rebasin-jax, because `rebasin` is taken on PyPI."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# Read from the source, since importing the package would need jax before it is installed.
SOURCE = (HERE / "rebasin/__init__.py").read_text()
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', SOURCE, re.MULTILINE)

# What training and the experiment binaries add to the alignment library; BUILD_NOTES.md gives the reasons.
EXPERIMENTS = [
    "absl-py>=2.1",
    "array-record>=0.8",
    "flax>=0.12",
    "importlib_resources>=6",  # TFDS imports it without declaring it
    "matplotlib>=3.9",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12",
    "pillow>=10",  # decodes the PNGs of prepared datasets
    "rich>=13.7",
    "tensorflow-datasets>=4.9.9",
]

# For the command and the checkpoints that it reads and writes; each is loaded when a file of its kind is.
CHECKPOINTS = ["absl-py>=2.1", "flax>=0.12", "orbax-checkpoint>=0.12", "safetensors>=0.5"]

# For the matching methods that learn, which load them when they are called.
SINKHORN = ["optax>=0.2.5", "ott-jax>=0.6"]

# Exact versions of the linters (ruff is above): a rule that changes with a release should not turn a check
# red by itself.
TEST = [
    "chex>=0.1.91",
    "dm-haiku>=0.0.16",  # models in other libraries have the same symmetries
    "equinox>=0.13",
    "hypothesis>=6.100",
    "pyright[nodejs]==1.1.414",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
]

# The book of docs/, which is read from the sources. Ruff writes signatures over several lines.
DOCS = ["mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1.0", "ruff==0.17.5"]

# What benchmarks/public_models.py builds its models from. Exact versions, since its table is in the docs.
# transformers 5 has no Flax models, diffusers announced their removal, and equimo 2 needs another Python.
PUBLIC_MODELS = [
    "absl-py>=1.4",  # recurrentgemma asks for less than 2
    "diffusers==0.35.2",
    "dm-haiku==0.0.17",
    "equimo==1.1.0",
    "equinox==0.13.8",
    "flax==0.12.8",
    "flaxmodels==0.1.3",
    "flowjax==19.1.2",
    "jax==0.10.2",
    "jraph==0.0.6.dev0",
    "pdequinox==0.1.2",
    "recurrentgemma==1.0.1",
    "transformers==4.57.6",
]

setup(
    name="rebasin-jax",
    version=VERSION,
    description="Align neural networks modulo permutation: infer symmetries, match, measure barriers.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The rebasin authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rebasin", "rebasin.*"]),
    package_data={"rebasin": ["py.typed", "training/digits.npz"]},
    install_requires=["jax>=0.10", "numpy>=2.0", "scipy>=1.13"],
    entry_points={"console_scripts": ["rebasin = rebasin.command.main:run"]},
    extras_require={
        "checkpoints": CHECKPOINTS,
        "docs": DOCS,
        "experiments": [*EXPERIMENTS, *SINKHORN],
        "public-models": PUBLIC_MODELS,
        "sinkhorn": SINKHORN,
        "test": [*EXPERIMENTS, *CHECKPOINTS, *SINKHORN, *DOCS, *TEST],
    },
    keywords=[
        "jax",
        "flax",
        "linear mode connectivity",
        "permutation symmetry",
        "model merging",
        "git re-basin",
    ],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
