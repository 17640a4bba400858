"""Give every fused linear of a decoder block a slot for an adapter.

A slot is a handful of graph inputs of the fused node whose defaults add nothing, so that a runtime
that knows of no adapters never sees them, and one that does sets them for each run: through
``.onnx_adapter`` files, or as tensors (:mod:`eoracc.plugins.adapters`). All nodes share the input
that says which adapter each row of the batch uses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.linears import block_of
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlot, AdapterSlots, stack_adapters
from eoracc.plugins.op import ADAPTER_INDEX, DOMAIN, FUSED_OP, Input
from eoracc.runtime.artifact.graph_names import LINEARS_KEY

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["add_slots"]


def add_slots(model: ir.Model, adapter_type: str) -> AdapterSlots:
    """Add slots to the tiled linears of every decoder block.

    Args:
      model: changed in place; its metadata list the slots.
      adapter_type: ``int8``, for factors of 8 and 4 bits, or ``float16``.

    Returns:
      The slots; none where no compressed linear stands in a decoder block.
    """
    graph = model.graph
    nodes = {str(node.name): node for node in graph if _takes_adapter(node)}
    slots = AdapterSlots(adapter_type, tuple(map(_slot, nodes.values())))
    if not slots.slots:
        return slots
    defaults = stack_adapters(slots, [])
    index = _input(graph, ADAPTER_INDEX, np.zeros(1, np.int32), ("adapter_batch",))
    for slot in slots.slots:
        node = nodes[slot.name]
        node.resize_inputs(len(Input))
        for operand in slots.operands:
            name = slot.input(operand)
            array = _unread(operand, defaults[name])
            node.replace_input_with(
                Input[operand], _input(graph, name, array, _shape(operand, array))
            )
        node.replace_input_with(Input.adapter_index, index)
    model.metadata_props[SLOTS_KEY] = slots.to_json()
    return slots


def _takes_adapter(node: ir.Node) -> bool:
    return (
        (node.domain, node.op_type) == (DOMAIN, FUSED_OP)
        and node.attributes.get_int("layout", 0) == 1
        and block_of(str(node.name)) is not None
    )


def _slot(node: ir.Node) -> AdapterSlot:
    rows = node.attributes["N"].as_int()
    return AdapterSlot(
        name=str(node.name),
        linears=tuple(node.metadata_props[LINEARS_KEY].split(",")),
        parts=tuple(node.attributes.get_ints("parts", (rows,))),
        in_features=node.attributes["K"].as_int(),
        out_features=rows,
    )


def _unread(operand: str, default: NDArray[np.generic]) -> NDArray[np.generic]:
    """``default`` without the scales of ``adapter_b``, which nobody reads at rank 0.

    All other defaults of rank 0 are empty; these would take 64 bytes for each tile of the model.
    """
    return default[:, :0] if operand == "adapter_b_scale" else default


def _shape(operand: str, array: NDArray[np.generic]) -> tuple[int | str | None, ...]:
    """The shape of ``array``, symbolic where the bank's size, rank or code width decides."""
    is_integer = array.dtype == np.uint8
    open_places = {
        "adapter_a": {1, 2} if is_integer else {1},
        "adapter_b": {2},
        "adapter_a_scale": {1},
        "adapter_b_scale": {1},
    }[operand]
    sizes = (None if place in open_places else size for place, size in enumerate(array.shape))
    return ("adapters", *list(sizes)[1:])


def _input(
    graph: ir.Graph, name: str, default: NDArray[np.generic], shape: tuple[int | str | None, ...]
) -> ir.Value:
    value = register_tensor(graph, ir.tensor(default, name=name))
    value.shape = ir.Shape(shape)
    graph.inputs.append(value)
    return value
