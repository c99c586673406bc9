"""The throughput benchmark: taking turns, ratios, and PyTorch's networks against ours."""

import importlib

import jax
import numpy as np
import pytest

from benchmarks import throughput, timing, torch_networks
from rebasin.errors import ConfigError
from rebasin.models import build_model


def test_contestants_take_turns_at_going_first():
    calls = []
    seconds = timing.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the first pair warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_the_ratio_is_paired():
    # The machine is ten times slower in the last two rounds; the ratio of medians would be 0.2 or 20.
    assert timing.median_ratio([2.0, 20.0, 20.0], [1.0, 10.0, 10.0]) == 2.0
    assert timing.median_ratio([1.0, 2.0, 90.0], [1.0, 1.0, 1.0]) == 2.0


@pytest.mark.parametrize("text", ["vit:8", "vgg16", "vgg16:0", "vgg16:x"])
def test_unknown_cases_are_refused(text):
    with pytest.raises(ConfigError, match="wanted model:width, model one of mlp, vgg16, resnet20; got"):
        throughput.parse_case(text)


def test_without_pytorch_the_error_says_what_to_do(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="PyTorch is not installed.*or pass --nopytorch"):
        torch_networks.import_torch()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["mlp:8", "vgg16:1", "resnet20:2"])
def test_pytorch_computes_the_same(text):
    pytest.importorskip("torch")
    case = throughput.parse_case(text)
    model = build_model(case.model, width=case.width, num_classes=10)
    variables = model.init(jax.random.key(0), np.zeros((1, *case.image), np.float32))
    rng = np.random.default_rng(0)
    # Every leaf is random: with zero biases a forgotten one would go unseen.
    variables = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables)
    throughput.check_same(case, variables, rng.integers(0, 256, (4, *case.image), np.uint8))
