"""Repair the graphs that mobius leaves incomplete, so that they equal the eager model.

Each repair was found by comparing logits with the eager model on small random checkpoints, in which
every parameter matters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from safetensors import safe_open

from eoracc.errors import ModelError
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.names import PARTS, WINDOW_KEY
from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PretrainedConfig

__all__ = ["repair"]


def repair(
    model: ir.Model, config: PretrainedConfig, *, folder: Path, weight_files: Sequence[Path]
) -> None:
    """Repair the graph that mobius built from ``folder``, so that it equals the eager model.

    Raises:
      ModelError: the checkpoint has tensors that the graph has no place for.
    """
    _strip_provenance(model)
    _mark_windows(model, config)
    _restore_tie(model, config)
    _restore_biases(model, folder, weight_files)
    _restore_embedding_scale(model, config)
    _restore_attention_scale(model, config)


def _windows(config: PretrainedConfig) -> list[int]:
    """Keys that a query of each layer sees; 0 where there is no window."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if not window:
        return [0] * layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [int(window)] * layers
    return [int(window) if kind == "sliding_attention" else 0 for kind in layer_types]


def _mark_windows(model: ir.Model, config: PretrainedConfig) -> None:
    """Note each layer's window on its Attention, and mask by it where the graph does not yet.

    mobius bakes the window into the additive float mask of some families (Gemma3) and leaves it
    out where its mask is the boolean padding mask (Mistral, Phi-3).
    """
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    windows = _windows(config)
    if len(attentions) != len(windows):
        return
    masked: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, window in zip(attentions, windows, strict=True):
        node.metadata_props[WINDOW_KEY] = str(window)
        mask = node.inputs[3]
        if not window or mask is None or mask.dtype == ir.DataType.FLOAT:
            continue
        if (mask, window) not in masked:
            masked[mask, window] = _window_mask(model.graph, mask, window, before=node)
        node.replace_input_with(3, masked[mask, window])


def _window_mask(graph: ir.Graph, mask: ir.Value, window: int, *, before: ir.Node) -> ir.Value:
    """``mask [B, 1, S, T]`` and ``query - key < window``, where query ``S - 1`` is at ``T - 1``."""
    tape = ir.tape.Tape()
    prefix = f"window_{window}"

    def constant(role: str, value: int | list[int]) -> ir.Value:
        return register_tensor(graph, ir.tensor(np.array(value), name=f"{prefix}.{role}"))

    def length(name: str) -> ir.Value:
        source = next(value for value in graph.inputs if value.name == name)
        return tape.op("Squeeze", [tape.op("Shape", [source], {"start": 1, "end": 2})])

    queries, keys, one = length("input_ids"), length("attention_mask"), constant("one", 1)
    query = tape.op("Range", [tape.op("Sub", [keys, queries]), keys, one])
    column = tape.op("Unsqueeze", [query, constant("axes", [1])])
    key = tape.op("Range", [constant("zero", 0), keys, one])
    near = tape.op("Less", [tape.op("Sub", [column, key]), constant("keys", window)])
    combined = tape.op("And", [mask, near])
    combined.type, combined.shape = mask.type, mask.shape
    graph.insert_before(before, tape.nodes)
    return combined


def _strip_provenance(model: ir.Model) -> None:
    """Remove the tracer's notes on each node: 20 kB a block, and redundant with the names."""
    for node in model.graph:
        node.metadata_props.clear()


def _restore_tie(model: ir.Model, config: PretrainedConfig) -> None:
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


def _restore_biases(model: ir.Model, folder: Path, weight_files: Sequence[Path]) -> None:
    """Add the biases that mobius drops (Llama's ``mlp_bias``); refuse any other lost tensor."""
    linears = {linear.name: linear for linear in find_linears(model)}
    for path in weight_files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                module, _, kind = name.rpartition(".")
                if _is_placed(name, model.graph) or (module in linears and kind == "weight"):
                    continue
                if module not in linears or kind != "bias":
                    raise ModelError(
                        f"{folder}: tensor {name} has no place in the graph: "
                        "this variant of the architecture is not supported"
                    )
                bias = tensors.get_tensor(name).float().numpy()
                _add_bias(model.graph, linears[module].node, name, bias)


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
    add.outputs[0].name = f"{product.name}_bias"
    add.outputs[0].type, add.outputs[0].shape = product.type, product.shape
    product.replace_all_uses_with(add.outputs[0])
    add.replace_input_with(0, product)
    graph.insert_after(matmul, add)


def _restore_embedding_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Give Gemma's embedding scale, ``sqrt(hidden_size)``, its float32 value.

    mobius rounds it to float16, which eager float32 does not; the difference of 1e-4 would reach
    every logit through the residual.
    """
    exact = np.float32(config.hidden_size**0.5)
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        for use in gather.outputs[0].uses():
            scale = use.node.inputs[1] if use.node.op_type == "Mul" else None
            if scale is None or scale.const_value is None or scale.const_value.size != 1:
                continue
            stored = scale.const_value.numpy()
            if stored.item() == float(np.float16(exact)) and stored.item() != float(exact):
                tensor = ir.tensor(np.full(stored.shape, exact), name=f"{scale.name}.float32")
                use.node.replace_input_with(1, register_tensor(model.graph, tensor))
                if not scale.uses():
                    del model.graph.initializers[str(scale.name)]


def _restore_attention_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Scale scores by ``query_pre_attn_scalar ** -0.5`` where the configuration says so (Gemma).

    mobius takes the head dimension instead, which Gemma3 27B does not have there.
    """
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if not scalar:
        return
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrFloat32("scale", float(scalar) ** -0.5))
