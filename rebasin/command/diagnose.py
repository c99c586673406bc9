"""``rebasin diagnose``: say why there is a barrier between two checkpoints, and what to try."""

import jax
from absl import flags

from rebasin.checkpoints import read_checkpoint
from rebasin.command.align import define_model_flags, describe, read_model_flags
from rebasin.command.arguments import load_data
from rebasin.command.command import Command
from rebasin.diagnosis.diagnosis import diagnose
from rebasin.errors import ConfigError
from rebasin.inference.infer import infer_spec
from rebasin.matching.registry import METHODS
from rebasin.permutation import identity_permutation, load_permutation

__all__ = ["DIAGNOSE"]

_ABOUT = """
Says why the path between networks A and B has a barrier, and what to try:
causes are removed one at a time, and the network halfway is measured again.

  rebasin diagnose --model my_package.models:apply --a a.safetensors
    --b b.safetensors --data data.npz

Nothing is written. Without labels in the data, the classes that A and B predict
together stand in for them.
"""

_FLAGS = flags.FlagValues()
define_model_flags(_FLAGS, inputs=False)
flags.DEFINE_string("a", None, "Checkpoint of network A, which stays.", flag_values=_FLAGS)
flags.DEFINE_string("b", None, "Checkpoint of network B, which is permuted.", flag_values=_FLAGS)
flags.DEFINE_string("data", None, ".npz file with the arrays inputs and labels.", flag_values=_FLAGS)
flags.DEFINE_integer(
    "num_examples", 1000, "Number of examples to take from the beginning of the data.", flag_values=_FLAGS
)
flags.DEFINE_string(
    "permutation",
    None,
    "The permutation to look into: a JSON file that rebasin align --permutation wrote, or 'identity' for the "
    "networks as they are. By default --method finds one.",
    flag_values=_FLAGS,
)
flags.DEFINE_enum(
    "method", "weights", list(METHODS), "The method that finds a permutation.", flag_values=_FLAGS
)
flags.DEFINE_integer("seed", 0, "Seed of methods that draw at random.", flag_values=_FLAGS)


def _run(values: flags.FlagValues) -> None:
    if values.num_examples < 1:
        raise ConfigError(f"--num_examples: wanted at least 1, got {values.num_examples}")
    apply_fn, _, names, template = read_model_flags(values)
    data = jax.tree.map(lambda x: x[: values.num_examples], load_data(values.data))
    a = read_checkpoint(values.a, names=names, template=template)
    b = read_checkpoint(values.b, names=names, template=template)
    print(describe("A", a))
    print(describe("B", b), flush=True)
    spec, permutation = None, None
    if values.permutation:
        inputs = data.inputs if isinstance(data.inputs, tuple) else (data.inputs,)
        spec = infer_spec(apply_fn, a.tree, *(x[:8] for x in inputs))
        if values.permutation == "identity":
            permutation = identity_permutation(spec, b.tree)
        else:
            permutation = load_permutation(values.permutation, spec)
    diagnosis = diagnose(
        apply_fn,
        a.tree,
        b.tree,
        data,
        permutation,
        spec=spec,
        method=values.method,
        key=jax.random.key(values.seed),
    )
    print(f"\n{diagnosis}")


DIAGNOSE = Command("diagnose", _ABOUT, _FLAGS, ("model", "a", "b", "data"), _run)
