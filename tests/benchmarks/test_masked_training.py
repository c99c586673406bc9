"""The benchmark of training with several masks: its forms train the same networks."""

import jax
import numpy as np
import pytest

from benchmarks.masked_training import FORMS, STORED_FORMS, MaskedNetworks, measure
from rebasin.training.data import load_dataset
from rebasin.training.recipes import Recipe

RECIPE = Recipe("digits", "mlp", width=4, epochs=1, num_train=64, batch_size=32, warmup_epochs=1)


@pytest.mark.slow
def test_all_forms_train_the_same_networks():
    networks = MaskedNetworks.draw(RECIPE, load_dataset("digits"), 2)
    trained = {form: networks.train(form) for form in FORMS}
    kernels = [state.variables["params"]["Dense_0"]["kernel"] for state in trained["one by one"]]
    for kernel, mask, start in zip(kernels, networks.masks, networks.states, strict=True):
        kept = np.asarray(mask["params"]["Dense_0"]["kernel"])
        assert 0 < kept.mean() < 1
        assert not np.asarray(kernel)[~kept].any()
        assert not np.array_equal(kernel, start.variables["params"]["Dense_0"]["kernel"])
    assert not np.array_equal(*kernels)
    for form in FORMS[1:]:
        for one, other in zip(trained["one by one"], trained[form], strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)

    results = measure(networks, 1)
    assert results["same_bits"]["one by one"]
    for seconds in (results["seconds"], results["processor_seconds"]):
        assert list(seconds) == [*FORMS, *STORED_FORMS]
        assert all(len(values) == 1 for values in seconds.values())
