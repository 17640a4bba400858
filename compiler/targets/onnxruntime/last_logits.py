"""Compute the head for each row's last tokens only: the vocabulary is a decoder's widest linear.

The lowered graph has an input ``logits_to_keep``, a scalar that is 1 unless it is given, and logits
``[B, logits_to_keep, V]`` of each row's last valid tokens. onnxruntime-genai does not know the
input: it gets the one row that it samples from.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.names import LOGITS_TO_KEEP
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.op import DOMAIN, FUSED_OP

__all__ = ["head_chain", "keep_last_logits"]

_ELEMENTWISE = {"Add", "Cast", "Div", "Mul", "Tanh"}
_LINEAR = (DOMAIN, FUSED_OP)
_NORMS = {"LayerNormalization", "RMSNormalization"}


def keep_last_logits(graph: ir.Graph, last: ir.Value) -> None:
    """Compute the head, and the norm before it, for each row's last tokens only.

    Left as it is where the logits are no linear, element-wise steps aside, of what a norm gives.

    Args:
      graph: of a decoder with ``input_ids [B, S]``, ``attention_mask [B, P + S]`` and ``logits``.
      last: index of each row's last valid token in its mask, ``int64 [B]``.
    """
    chain = head_chain(graph)
    if not chain:
        return
    norm = chain[0]
    ids, mask = (
        next(value for value in graph.inputs if value.name == name)
        for name in ("input_ids", "attention_mask")
    )
    tape = ir.tape.Tape()

    def constant(role: str, value: int | list[int]) -> ir.Value:
        return register_tensor(graph, ir.tensor(np.array(value, np.int64), name=f"logits.{role}"))

    def length(value: ir.Value) -> ir.Value:
        return tape.op("Shape", [value], {"start": 1, "end": 2})

    keep = register_tensor(graph, ir.tensor(np.array(1, np.int64), name=LOGITS_TO_KEEP))
    graph.inputs.append(keep)
    one, zero = constant("one", 1), constant("zero", 0)
    past = tape.op("Sub", [length(mask), length(ids)])
    end = tape.op("Unsqueeze", [tape.op("Sub", [last, past]), constant("column", [1])])
    offsets = tape.op("Range", [tape.op("Sub", [one, keep]), one, one])
    # A position is negative before a row's first token, and for the last token of a row that was
    # padded in an earlier call: the right token is then the only one of this call.
    positions = tape.op("Max", [tape.op("Add", [end, offsets]), zero])
    indices = tape.op("Unsqueeze", [positions, constant("place", [2])])
    kept = tape.op("GatherND", [norm.inputs[0], indices], {"batch_dims": 1})
    graph.insert_before(norm, tape.nodes)
    norm.replace_input_with(0, kept)
    for node in chain:
        output = node.outputs[0]
        if output.shape is not None and len(output.shape) == 3:
            output.shape = ir.Shape([output.shape[0], LOGITS_TO_KEEP, output.shape[2]])
    logits = chain[-1].outputs[0]
    if logits.shape is not None:
        # The 1 tells onnxruntime-genai that it gets one row, however long the prompt is.
        logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])


def head_chain(graph: ir.Graph) -> list[ir.Node]:
    """The nodes from the final norm to the logits.

    Empty where the logits are no linear, element-wise steps aside, of what a norm gives.
    """
    value = next((output for output in graph.outputs if output.name == "logits"), None)
    chain: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        chain.insert(0, node)
        if node.op_type in _NORMS:
            return chain
        is_linear = node.op_type == "MatMul" or (node.domain, node.op_type) == _LINEAR
        if not is_linear and node.op_type not in _ELEMENTWISE:
            return []
        operands = [operand for operand in node.inputs if operand is not None]
        computed = (
            operands[:1]
            if is_linear
            else [operand for operand in operands if not _constant(operand)]
        )
        value = computed[0] if len(computed) == 1 else None
        if value is not None and len(list(value.uses())) != 1:
            return []
    return []


def _constant(value: ir.Value) -> bool:
    return value.const_value is not None
