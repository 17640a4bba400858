"""Tensors of the checkpoint that the graph holds twice or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.errors import ModelError
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.names import PARTS
from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

__all__ = ["restore_biases", "restore_tie"]


def restore_tie(model: ir.Model, config: PretrainedConfig) -> None:
    """Make a tied head multiply with the embedding itself, which mobius does for most families.

    Gemma3 comes with a transposed second view of it, which would be stored a second time.
    """
    graph = model.graph
    embedding = graph.initializers.get("model.embed_tokens.weight")
    separate = graph.initializers.get("lm_head.weight_t")
    if not config.tie_word_embeddings or embedding is None or separate is None:
        return
    for node, position in list(separate.uses()):
        transpose = ir.node("Transpose", [embedding], {"perm": [1, 0]}, name="lm_head/Transpose")
        transpose.outputs[0].name = "v_lm_head.Transpose"
        transpose.outputs[0].type = embedding.type
        transpose.outputs[0].shape = separate.shape
        graph.insert_before(node, transpose)
        node.replace_input_with(position, transpose.outputs[0])
    del graph.initializers["lm_head.weight_t"]


_BIAS_FLAGS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
}
"""The field of the configuration that gives a linear a bias, by the role of the linear."""


def restore_biases(
    model: ir.Model, config: PretrainedConfig, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Add the biases that mobius drops (Llama's ``mlp_bias``); refuse any other lost tensor."""
    linears = {linear.name: linear for linear in find_linears(model)}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if _is_placed(name, model.graph) or (module in linears and kind == "weight"):
            continue
        if module not in linears or kind != "bias":
            raise ModelError(
                f"{folder}: tensor {name} has no place in the graph: "
                "this variant of the architecture is not supported"
            )
        flag = _BIAS_FLAGS.get(linears[module].role, "")
        if getattr(config, flag, None) is False:
            raise ModelError(
                f"{folder}: tensor {name} is in the checkpoint, and {flag} in its config.json is "
                "false, so that transformers leaves it out: correct one of the two"
            )
        _add_bias(model.graph, linears[module].node, name, tensor.float().numpy())


def _is_placed(name: str, graph: ir.Graph) -> bool:
    module, _, kind = name.rpartition(".")
    parent, _, role = module.rpartition(".")
    stored = [name, *(f"{parent}.{part}.{kind}" for part in PARTS.get(role, ()))]
    # Frequencies are no parameter: old checkpoints carry them, the graph has their tables.
    return kind == "inv_freq" or any(
        key in graph.initializers or f"{key}_t" in graph.initializers for key in stored
    )


def _add_bias(graph: ir.Graph, matmul: ir.Node, name: str, bias: NDArray[np.generic]) -> None:
    value = register_tensor(graph, ir.tensor(bias.astype(np.float32), name=name))
    product = matmul.outputs[0]
    add = ir.node("Add", [product, value], name=f"{matmul.name}_bias")
    total = add.outputs[0]
    total.type, total.shape = product.type, product.shape
    # The output of the graph keeps its name.
    total.name, product.name = product.name, f"{product.name}_without_bias"
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    graph.insert_after(matmul, add)
