import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.repair import MATCHINGS, UNALIGNED, VARIANTS, PairMeasurements, report
from benchmarks.reports import Reporter
from rebasin import models
from rebasin.models import BatchNorm
from rebasin.training.data import load_dataset
from rebasin.training.recipes import Recipe


class Normed(nn.Module):
    """A hidden layer with BatchNorm."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(8)(images.reshape(len(images), -1))
        return nn.Dense(10)(nn.relu(BatchNorm()(x)))


@pytest.mark.slow
def test_variants_are_measured_and_told_apart(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "normed", lambda width, num_classes: Normed())
    digits = load_dataset("digits")
    measurements = PairMeasurements(
        Recipe("digits", "normed", width=8, epochs=5), digits, num_alphas=3, num_test=50, num_train=60
    )
    images = jnp.zeros((1, 8, 8, 1))
    rng = np.random.default_rng(0)
    a, b = (
        jax.tree.map(
            lambda x: jnp.abs(x) + jnp.asarray(rng.uniform(0.1, 1, x.shape), x.dtype),
            Normed().init(jax.random.key(seed), images),
        )
        for seed in (0, 1)
    )
    pairs = [
        {
            "methods": {
                name: measurements.measure(a, measurements.align(name, a, b))
                for name in (UNALIGNED, *MATCHINGS)
            }
        }
    ]
    for found in pairs[0]["methods"].values():
        assert tuple(found) == VARIANTS
        ends = {variant: found[variant]["end_logit_difference"] for variant in VARIANTS}
        assert ends["as is"] == 0
        assert ends["REPAIR"] < 1e-3 < ends["reset"]  # the statistics here are not those of any data
        assert found["REPAIR"]["loss"][1] != found["as is"]["loss"][1]
        np.testing.assert_allclose(
            [found["REPAIR"]["loss"][i] for i in (0, -1)],
            [found["as is"]["loss"][i] for i in (0, -1)],
            rtol=1e-3,
        )
    report(pairs, Reporter())
    assert capsys.readouterr().out.count("REPAIR") == 3
