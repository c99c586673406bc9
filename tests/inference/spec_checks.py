"""What the tests of inference share: small trees, and a spec compared with the one worked out by hand."""

import jax.numpy as jnp
import numpy as np

from rebasin import PermutationSpec, infer_spec, verify_spec

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def tree(**shapes):
    """A flat tree of random float32 leaves."""
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def check(function, params, *inputs, indexed=None, fixed=(), **expected):
    """Infers, verifies in float64, and compares with the table expected, whatever the groups are called."""
    spec = infer_spec(function, params, *inputs)
    verify_spec(spec, function, params, *inputs)
    wanted = PermutationSpec.from_axes(expected, indexed=indexed, fixed=fixed)
    assert spec.equivalent(wanted), f"inferred:\n{spec}\nwanted:\n{wanted}"
    return spec
