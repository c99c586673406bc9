"""Networks of Haiku, and graph networks of jraph with MLPs of Haiku."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.public_zoo.specimen import Specimen, draw, draw_indices, import_optional

__all__ = ["HAIKU", "JRAPH"]


def _haiku(
    forward: Callable[..., Any], inputs: Any, others: Any, *, is_training: bool | None = None
) -> Specimen:
    """Build a Haiku network.

    Args:
      forward: the network; it also takes the keyword `is_training` if that is given.
      inputs: example inputs.
      others: inputs of another length.
      is_training: how the network is called; in training its next state is an output. `None` for a network
        that does the same in training and evaluation.
    """
    transformed = import_optional("haiku").transform_with_state(forward)
    # Haiku's BatchNorm makes its statistics in a call in training only.
    first, options = (
        ({}, {}) if is_training is None else ({"is_training": True}, {"is_training": is_training})
    )
    params, state = jax.jit(partial(transformed.init, **first))(jax.random.key(0), *inputs)

    def function(tree: Any, *inputs: Any) -> Any:
        outputs, state = transformed.apply(tree["params"], tree["state"], None, *inputs, **options)
        return (outputs, state) if is_training else outputs

    states = {"1": "state"} if is_training else {}
    return Specimen(function, {"params": params, "state": state}, inputs, others, states)


def _haiku_resnet(*, is_v2: bool, is_training: bool) -> Specimen:
    hk = import_optional("haiku")
    sizes = {"blocks_per_group": (1, 1, 1, 1), "channels_per_group": (8, 12, 16, 20), "bottleneck": True}
    start = {"output_channels": 6}

    def forward(x: Any, is_training: bool) -> Any:
        network = hk.nets.ResNet(num_classes=5, resnet_v2=is_v2, initial_conv_config=start, **sizes)
        return network(x, is_training=is_training)

    return _haiku(forward, (draw(2, 32, 32, 3),), (draw(3, 40, 40, 3),), is_training=is_training)


def _haiku_mobilenet() -> Specimen:
    hk = import_optional("haiku")

    def forward(x: Any, is_training: bool) -> Any:
        network = hk.nets.MobileNetV1((1, 2, 1), (6, 8, 10), num_classes=5)
        return network(x, is_training=is_training)

    return _haiku(forward, (draw(2, 32, 32, 3),), (draw(2, 48, 48, 3),), is_training=False)


def _haiku_lstm() -> Specimen:
    hk = import_optional("haiku")

    def forward(x: Any) -> Any:
        core = hk.deep_rnn_with_skip_connections([hk.LSTM(6), hk.LSTM(7)])
        outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.nets.MLP([8, 5])(outputs)

    return _haiku(forward, (draw(7, 2, 3),), (draw(11, 3, 3),))


def _haiku_vqvae() -> Specimen:
    hk = import_optional("haiku")

    def forward(x: Any) -> Any:
        codes = hk.nets.VectorQuantizer(embedding_dim=6, num_embeddings=10, commitment_cost=0.25)
        quantized = codes(hk.nets.MLP([8, 6])(x), is_training=False)
        return hk.nets.MLP([8, 3])(quantized["quantize"]), quantized["loss"]

    return _haiku(forward, (draw(6, 3),), (draw(9, 3),))


def _graph(nodes: int, edges: int) -> Any:
    """Return two random graphs with four features a node, three an edge and two a graph."""
    return import_optional("jraph").GraphsTuple(
        nodes=draw(nodes, 4),
        edges=draw(edges, 3),
        globals=draw(2, 2),
        senders=draw_indices(0, nodes, edges),
        receivers=draw_indices(0, nodes, edges, seed=1),
        n_node=jnp.array([nodes // 2, nodes - nodes // 2]),
        n_edge=jnp.array([edges // 2, edges - edges // 2]),
    )


def _jraph(build: Callable[[Any, Callable[..., Any]], Any]) -> Specimen:
    """Build a graph network; `build` gets jraph and a function that makes MLPs, and returns the layers."""
    hk, jraph = import_optional("haiku"), import_optional("jraph")

    def mlp(*sizes: int) -> Callable[..., Any]:
        def apply(*features: Any) -> Any:
            leaves = jax.tree.leaves(features)
            return hk.nets.MLP(sizes)(jnp.concatenate(leaves, axis=-1))

        return apply

    def forward(graph: Any) -> Any:
        for layer in build(jraph, mlp):
            graph = layer(graph)
        return hk.Linear(5)(graph.nodes), hk.Linear(5)(graph.globals)

    return _haiku(forward, (_graph(7, 12),), (_graph(9, 17),))


def _graph_network(jraph: Any, mlp: Any) -> list[Any]:
    """Return two layers that update edges, nodes and globals."""
    return [jraph.GraphNetwork(mlp(8, 9), mlp(10, 11), mlp(6, 7)) for _ in range(2)]


def _graph_convolution(jraph: Any, mlp: Any) -> list[Any]:
    return [jraph.GraphConvolution(mlp(size), add_self_edges=True) for size in (8, 9)]


def _graph_attention(jraph: Any, mlp: Any) -> list[Any]:
    """Return two layers of attention over edges; the first has the features of its nodes in the logits."""
    return [jraph.GAT(mlp(size), lambda sent, received, edges: mlp(6, 1)(sent, received)) for size in (8, 9)]


def _interaction_network(jraph: Any, mlp: Any) -> list[Any]:
    return [jraph.InteractionNetwork(mlp(8, 9), mlp(10, 11)) for _ in range(2)]


def _deep_sets(jraph: Any, mlp: Any) -> list[Any]:
    return [jraph.DeepSets(mlp(8, 9), mlp(10, 11)) for _ in range(2)]


HAIKU: dict[str, Callable[[], Specimen]] = {
    "ResNet v1 in evaluation": partial(_haiku_resnet, is_v2=False, is_training=False),
    "ResNet v2 in training": partial(_haiku_resnet, is_v2=True, is_training=True),
    "MobileNetV1": _haiku_mobilenet,
    "two LSTMs with skip connections": _haiku_lstm,
    "VectorQuantizer between MLPs": _haiku_vqvae,
}

JRAPH: dict[str, Callable[[], Specimen]] = {
    "GraphNetwork": partial(_jraph, _graph_network),
    "GraphConvolution": partial(_jraph, _graph_convolution),
    "GAT": partial(_jraph, _graph_attention),
    "InteractionNetwork": partial(_jraph, _interaction_network),
    "DeepSets": partial(_jraph, _deep_sets),
}
