"""Average two networks that were trained from different seeds, as they are and aligned."""

import tempfile

import numpy as np

import rebasin
from rebasin.models import build_model
from rebasin.training import build_apply, build_recipe, load_dataset, train

digits = load_dataset("digits")
recipe = build_recipe("trajectory", dataset="digits", model="mlp", width=128, epochs=20, batch_size=32)
with tempfile.TemporaryDirectory() as folder:
    a, b = (train(recipe, digits, seed=seed, directory=f"{folder}/{seed}").last for seed in (0, 1))
apply_fn = build_apply(build_model("mlp", width=128, num_classes=10), digits)


def accuracy(params):
    return np.mean(apply_fn(params, digits.test.inputs).argmax(-1) == digits.test.labels)


aligned = rebasin.align(apply_fn, a, b, digits.test.inputs[:1])
print(f"A {accuracy(a):.1%}, B {accuracy(b):.1%}")
print(f"average as they are {accuracy(rebasin.average([a, b])):.1%}")
print(f"average aligned {accuracy(rebasin.average([a, aligned.params])):.1%}")
