"""Federated averaging: three clients with initialisations of their own and digits that the others never see.

Matching helps in the first round. From then on clients begin at one network, and it makes no difference.
"""

import dataclasses
import tempfile

import jax
import numpy as np

import rebasin
from rebasin.models import build_model
from rebasin.training import build_apply, build_recipe, load_dataset, train
from rebasin.training.loop import InitialState

digits, changes = load_dataset("digits"), {"warmup_epochs": 0, "peak_learning_rate": 0.05, "batch_size": 32}
recipe = build_recipe("trajectory", dataset="digits", model="mlp", width=256, epochs=4, **changes)
apply_fn = build_apply(build_model("mlp", width=256, num_classes=10), digits)
splits = [rebasin.Batch(*(x[digits.train.labels % 3 == n] for x in digits.train)) for n in range(3)]


def train_client(number, server, seed):
    start = None if server is None else InitialState(server, 0)
    data = dataclasses.replace(digits, train=splits[number])
    with tempfile.TemporaryDirectory() as folder:
        return train(recipe, data, seed=seed + number, directory=folder, start=start).last


for matched in (False, True):
    server = None
    for turn in range(3):
        trees = [train_client(number, server, 10 * turn) for number in range(3)]
        if matched:
            spec = rebasin.infer_spec(apply_fn, trees[0], digits.test.inputs[:1])
            trees = rebasin.merge_many(spec, trees, key=jax.random.key(turn)).align(spec, trees)
        server = rebasin.average(trees)
        accuracy = np.mean(apply_fn(server, digits.test.inputs).argmax(-1) == digits.test.labels)
        print(f"{'matched' if matched else 'plain'}, round {turn + 1}: {accuracy:.1%}")
