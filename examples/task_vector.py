"""Move what one network has learned by fine-tuning to another network, which was trained from another seed.

A and B know digits. A is fine-tuned on digits that are turned by a quarter. The difference is added to B, as
it is and in the order of B's units (task vectors: arXiv 2212.04089).
"""

import dataclasses
import tempfile

import jax
import numpy as np

import rebasin
from rebasin.models import build_model
from rebasin.training import build_apply, build_recipe, load_dataset, train
from rebasin.training.loop import InitialState

digits = load_dataset("digits")
turned = rebasin.Batch(np.rot90(digits.train.inputs, axes=(1, 2)), digits.train.labels)
test = rebasin.Batch(np.rot90(digits.test.inputs, axes=(1, 2)), digits.test.labels)
recipe = build_recipe("trajectory", dataset="digits", model="mlp", width=256, epochs=20, batch_size=32)
apply_fn = build_apply(build_model("mlp", width=256, num_classes=10), digits)
with tempfile.TemporaryDirectory() as folder:
    a, b = (train(recipe, digits, seed=seed, directory=f"{folder}/{seed}").last for seed in (0, 1))
    task = dataclasses.replace(digits, train=turned)
    tuned = train(recipe, task, seed=2, directory=f"{folder}/t", start=InitialState(a, 10)).last


def accuracy(params):
    return np.mean(apply_fn(params, test.inputs).argmax(-1) == test.labels)


match = rebasin.align(apply_fn, b, a, digits.test.inputs[:1])
difference = jax.tree.map(np.subtract, tuned, a)
moved = rebasin.permute(match.spec, match.permutation, difference)
print(f"turned digits: A {accuracy(a):.1%}, A fine-tuned {accuracy(tuned):.1%}, B {accuracy(b):.1%}")
for name, vector in (("as it is", difference), ("in B's order", moved)):
    after = accuracy(jax.tree.map(np.add, b, vector))
    kept = (after - accuracy(b)) / (accuracy(tuned) - accuracy(a))
    print(f"B plus the difference {name}: {after:.1%}, {kept:.0%} of the gain")
