"""Random numbers: each position gets its own, so whatever is combined with them stays put."""

from collections.abc import Sequence

from rebasin.inference.axes import Node, pin, pinned, unite
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.values import Dims

DIFFER = "random numbers differ by position; use the model's deterministic mode"


@register_rule("random_bits", "random_split")
def draw(equation: Equation, keys: Dims) -> Sequence[Dims]:
    """Pin the positions i of ``out[k, i] = f(keys[k], i)``; keys may move, and their draws with them."""
    (shape,) = equation.shapes
    why = equation.because(DIFFER)
    return [(*keys, *(pinned(size, why, position_dependent=False) for size in shape[len(keys) :]))]


@register_rule("random_seed", "random_clone", "random_fold_in")
def keywise(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Unite the axes of ``out[k] = f(x[k], …)``, a key made of each seed, or of each key and number."""
    for other in inputs[1:]:
        for x, y in zip(inputs[0], other, strict=True):
            unite(x, y, equation.because("operands with incompatible factors"))
    return [inputs[0]]


@register_rule("random_wrap")
def wrap(equation: Equation, words: Dims) -> Sequence[Dims]:
    """Pin the words of each key: ``out[k]`` is the key whose words are ``words[k, :]``."""
    (shape,) = equation.shapes
    for node in words[len(shape) :]:
        pin(node, equation.because("the words of a random key"))
    return [words[: len(shape)]]


@register_rule("random_unwrap")
def unwrap(equation: Equation, keys: Dims) -> Sequence[Dims]:
    """Pin the words of each key: ``out[k, :]`` are the words of key k."""
    (shape,) = equation.shapes
    why = equation.because("the words of a random key")
    return [(*keys, *(pinned(size, why) for size in shape[len(keys) :]))]


@register_rule("threefry2x32", "threefry4x32", "philox2x32", "philox4x32", "iota_2x32_shape")
@register_rule("rng_bit_generator", "rng_uniform", "random_gamma")
def generate(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Pin all axes: the numbers depend on the key's words and on the position."""
    why = equation.because(DIFFER)
    for dims in inputs:
        for node in dims:
            pin(node, why)
    outputs: list[tuple[Node, ...]] = [
        tuple(pinned(size, why) for size in shape) for shape in equation.shapes
    ]
    return outputs
