"""How often weight matching undoes a random permutation of Gaussian weights exactly, from either start.

python -m benchmarks.planted_recovery
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from rebasin.models import MLP, VGG16, ResNet20

SEEDS = 20
CIFAR = (1, 32, 32, 3)
CASES = {
    "MLP 3072-128×3-10": (MLP((128,) * 3, 10), CIFAR),
    "MLP 8-64×5-4": (MLP((64,) * 5, 4), (1, 1, 1, 8)),  # few inputs, so little tells the first units apart
    "VGG-16 width 8": (VGG16(8, 10), CIFAR),
    "ResNet-20 width 8": (ResNet20(8, 10), CIFAR),
    "ResNet-20 width 16": (ResNet20(16, 10), CIFAR),
}


def main() -> None:
    """Prints one row for each model and start."""
    print(f"{'model':>18} {'start':>9} {'recovered':>9} {'sweeps':>6} {'solves':>6} {'ms':>6}")
    for name, (model, image_shape) in CASES.items():
        image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), image)
        spec = rebasin.infer_spec(model.apply, shapes, image)
        for start in ("identity", "depth"):
            recovered, matches = 0, []
            for seed in range(SEEDS):
                rng = np.random.default_rng(seed)
                a = jax.tree.map(lambda s, rng=rng: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
                b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
                began = time.perf_counter()
                match = rebasin.weight_matching(spec, a, b, key=jax.random.key(seed), start=start)
                seconds = time.perf_counter() - began
                moved = rebasin.permute(spec, match.permutation, b)
                same = zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True)
                recovered += all(np.array_equal(x, y) for x, y in same)
                matches.append((match.num_sweeps, match.stats["assignments"], 1000 * seconds))
            sweeps, solves, milliseconds = np.median(matches, axis=0)
            print(
                f"{name:>18} {start:>9} {f'{recovered}/{SEEDS}':>9} {sweeps:>6.0f} {solves:>6.0f} "
                f"{milliseconds:>6.0f}"
            )


if __name__ == "__main__":
    main()
