"""Models and layers in Flax: recurrentgemma, flaxmodels, and what Flax itself has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.public_zoo.specimen import Specimen, draw, draw_indices, import_optional

__all__ = ["FLAX", "FLAXMODELS", "RECURRENTGEMMA"]


def _linen(module: Any, inputs: tuple[Any, ...], others: Any = None, **options: Any) -> Specimen:
    """Take the variables of a Linen module whole; `options` are given to every call."""
    variables = jax.jit(partial(module.init, **options))(jax.random.key(0), *inputs)
    return Specimen(partial(module.apply, **options), variables, inputs, others)


def _griffin() -> Specimen:
    """Build a Griffin of one recurrent block and one block of local attention."""
    common, jax_models = import_optional("recurrentgemma.common"), import_optional("recurrentgemma.jax")
    config = common.GriffinConfig(
        vocab_size=50,
        width=24,
        mlp_expanded_width=40,
        num_heads=3,
        block_types=(common.TemporalBlockType.RECURRENT, common.TemporalBlockType.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=8,
        logits_soft_cap=30.0,
        lru_width=30,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    module = jax_models.Griffin(config, dtype=jnp.dtype("float64"), param_dtype=jnp.dtype("float64"))

    def sentences(length: int) -> tuple[Any, ...]:
        return draw_indices(0, 50, 2, length), jnp.tile(jnp.arange(length), (2, 1))

    specimen = _linen(module, sentences(7), sentences(11))

    def logits(variables: Any, tokens: Any, positions: Any) -> Any:
        return module.apply(variables, tokens, positions, return_cache=False)[0]

    return specimen._replace(function=logits)


def _flaxmodels_resnet() -> Specimen:
    module = import_optional("flaxmodels").ResNet18("logits", pretrained=None, normalize=False, num_classes=5)
    return _linen(module, (draw(2, 32, 32, 3),), (draw(2, 48, 48, 3),), train=False)


def _bidirectional_lstm() -> Specimen:
    nn = import_optional("flax.linen")
    module = nn.Bidirectional(
        nn.RNN(nn.OptimizedLSTMCell(6, param_dtype=float)), nn.RNN(nn.GRUCell(7, param_dtype=float))
    )
    return _linen(nn.Sequential([module, nn.Dense(5)]), (draw(2, 7, 3),), (draw(3, 11, 3),))


def _conv_lstm() -> Specimen:
    nn = import_optional("flax.linen")
    cells = [nn.RNN(nn.ConvLSTMCell(size, (3, 3), param_dtype=float)) for size in (4, 5)]
    return _linen(nn.Sequential([*cells, nn.Dense(2)]), (draw(2, 4, 6, 6, 3),), (draw(2, 6, 8, 8, 3),))


def _linen_attention() -> Specimen:
    nn = import_optional("flax.linen")
    attention = [nn.MultiHeadDotProductAttention(3, qkv_features=24, normalize_qk=True) for _ in range(2)]
    layers = [nn.Dense(18), attention[0], nn.LayerNorm(), attention[1], nn.Dense(5)]
    return _linen(nn.Sequential(layers), (draw(2, 7, 4),), (draw(3, 11, 4),))


def _nnx_block() -> Specimen:
    """Build an encoder block of NNX's layers: attention, norm, feed-forward network, batch norm."""
    nnx = import_optional("flax.nnx")
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 18, rngs=rngs),
        nnx.MultiHeadAttention(3, 18, 24, decode=False, rngs=rngs),
        nnx.RMSNorm(18, rngs=rngs),
        nnx.Linear(18, 20, rngs=rngs),
        nnx.silu,
        nnx.BatchNorm(20, use_running_average=True, rngs=rngs),
        nnx.Linear(20, 5, rngs=rngs),
    )
    graph, params, rest = nnx.split(model, nnx.Any(nnx.Param, nnx.BatchStat), ...)
    params = nnx.to_pure_dict(params)

    def function(params: Any, x: Any) -> Any:
        return nnx.merge(graph, nnx.State(params), rest)(x)

    return Specimen(function, params, (draw(2, 7, 4),), (draw(3, 11, 4),))


RECURRENTGEMMA: dict[str, Callable[[], Specimen]] = {"Griffin": _griffin}

FLAXMODELS: dict[str, Callable[[], Specimen]] = {"ResNet-18": _flaxmodels_resnet}

FLAX: dict[str, Callable[[], Specimen]] = {
    "Linen: LSTM and GRU in two directions": _bidirectional_lstm,
    "Linen: two ConvLSTMs": _conv_lstm,
    "Linen: two layers of attention": _linen_attention,
    "NNX: attention and feed-forward layers": _nnx_block,
}
