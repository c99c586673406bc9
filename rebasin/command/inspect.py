"""``rebasin inspect``: print the symmetries of a model, and why the rest stays put."""

import jax
from absl import flags

from rebasin.checkpoints import read_checkpoint
from rebasin.command.align import define_model_flags, describe, read_model_flags
from rebasin.command.command import Command
from rebasin.inference.infer import infer_spec
from rebasin.inference.verification import verify_spec

__all__ = ["INSPECT"]

_ABOUT = """
Prints which axes of which leaves move together, the role of every leaf, and
why all other axes stay put. The symmetries are verified with random weights.

  rebasin inspect --model my_package.models:apply --inputs 'float32[8,784]'
    --checkpoint a.safetensors
"""

_FLAGS = flags.FlagValues()
define_model_flags(_FLAGS)
flags.DEFINE_string("checkpoint", None, "A checkpoint of the model.", flag_values=_FLAGS)
flags.DEFINE_boolean("json", False, "Print the spec as JSON instead.", flag_values=_FLAGS)


def _run(values: flags.FlagValues) -> None:
    apply_fn, inputs, names, template = read_model_flags(values)
    checkpoint = read_checkpoint(values.checkpoint, names=names, template=template)
    # On the device once, rather than in each of the calls.
    tree = jax.tree.map(jax.numpy.asarray, checkpoint.tree)
    spec = infer_spec(apply_fn, tree, *inputs)
    verify_spec(spec, apply_fn, tree, *inputs)
    if values.json:
        print(spec.to_json())
        return
    print(describe("checkpoint", checkpoint))
    print(spec.explain(tree))


INSPECT = Command("inspect", _ABOUT, _FLAGS, ("model", "checkpoint", "inputs"), _run)
