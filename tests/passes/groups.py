"""Groups of linears for the tests of layer passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.passes.graph.linears import LinearGroup, find_linears
from eoracc.passes.solvers.gram import accumulate_gram

__all__ = ["correlated", "make_group", "ones", "qkv"]


def ones(count: int) -> NDArray[np.float32]:
    """Token weights of ``count`` tokens, none of them padding."""
    return np.ones(count, np.float32)


def correlated(rng: np.random.Generator, tokens: int, width: int) -> NDArray[np.float32]:
    """Inputs as layers see them: a few directions carry most of the energy."""
    mixing = rng.standard_normal((width, width)) * np.geomspace(1, 0.03, width)[:, None]
    return (rng.standard_normal((tokens, width)) @ mixing).astype(np.float32)


def make_group(
    weights: Mapping[str, NDArray[np.float32]], inputs: NDArray[np.float32] | None = None
) -> LinearGroup:
    """Linears named by the keys of ``weights``, ``[N, K]`` each, that share one input."""
    width = next(iter(weights.values())).shape[1]
    shared = ir.Value(name="x", shape=ir.Shape(["t", width]), type=ir.TensorType(ir.DataType.FLOAT))
    initializers, nodes = [], []
    for name, weight in weights.items():
        stored = ir.Value(
            name=f"{name}.weight",
            const_value=ir.tensor(np.ascontiguousarray(weight.T), name=f"{name}.weight"),
            shape=ir.Shape(weight.T.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        initializers.append(stored)
        node = ir.node("MatMul", [shared, stored], name=name)
        node.outputs[0].name = f"{name}.out"
        nodes.append(node)
    graph = ir.Graph(
        [shared],
        [node.outputs[0] for node in nodes],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 24},
    )
    linears = tuple(find_linears(ir.Model(graph, ir_version=10)))
    gram = None
    if inputs is not None:
        batch = (inputs, ones(len(inputs)))
        gram = replace(accumulate_gram([batch], width), activations=lambda: iter([batch]))
    return LinearGroup(linears, gram=gram)


def qkv(*, tokens: int | None = 400) -> LinearGroup:
    """Two projections of unlike heights, with a Gram of ``tokens`` correlated tokens or none."""
    rng = np.random.default_rng(7)
    weights = {
        "model.layers.0.self_attn.q_proj": rng.standard_normal((40, 72)).astype(np.float32),
        "model.layers.0.self_attn.k_proj": rng.standard_normal((24, 72)).astype(np.float32),
    }
    return make_group(weights, None if tokens is None else correlated(rng, tokens, 72))
