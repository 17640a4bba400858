"""Write a graph as model.onnx and its weights as one file that can be mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.runtime.artifact.onnx_file import MODEL_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import onnx
    import onnx_ir as ir

__all__ = ["DATA_FILE", "graph_bytes", "write_graph"]

DATA_FILE = "model.onnx.data"

_ALIGNMENT = 1 << 6
"""Offsets in the data file: a cache line, so that no vector of codes crosses two. A runtime maps
whole pages and adds the rest of the offset; tensors at pages of their own would take 2 kB more
each, 1 MB of SmolLM2's folder."""

_INLINE_UP_TO = 1 << 8
"""Bytes of a tensor that stays in model.onnx, where shape inference can see it."""


def write_graph(model: ir.Model, folder: Path) -> Path:
    """Write model.onnx, and the tensors above 256 bytes to model.onnx.data, in graph order.

    Args:
      model: what to write; unchanged afterwards.
      folder: where to; it exists.

    Returns:
      Where model.onnx is.

    Raises:
      OSError: the disk is full, or cannot be written.
    """
    path = folder / MODEL_FILE
    outside = dict(_stored_outside(model))
    try:
        if outside:
            _write_tensors(outside, folder)
        path.write_bytes(_serialized(model).SerializeToString())
    finally:
        for value, tensor in outside.items():
            value.const_value = tensor
    return path


def graph_bytes(model: ir.Model) -> int:
    """The bytes of both files that :func:`write_graph` writes. No tensor outside is computed.

    Args:
      model: what would be written; unchanged afterwards.
    """
    outside = dict(_stored_outside(model))
    end = 0
    try:
        for value, tensor in outside.items():
            end += -end % _ALIGNMENT
            value.const_value = _reference(value, tensor, end)
            end += tensor.nbytes
        return end + int(_serialized(model).ByteSize())
    finally:
        for value, tensor in outside.items():
            value.const_value = tensor


def _serialized(model: ir.Model) -> onnx.ModelProto:
    """What model.onnx holds: all but the types of initializers and of their casts.

    Tensors and nodes tell them, and they would be a sixth of SmolLM2's model.onnx.
    """
    import onnx_ir  # noqa: PLC0415 - `eoracc schema` and the like do without

    proto = onnx_ir.to_proto(model)
    known = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in known:
            known.update(node.output)
    types = [info for info in proto.graph.value_info if info.name not in known]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(types)
    return proto


def _stored_outside(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The initializers that are too large for model.onnx, and their tensors."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes > _INLINE_UP_TO:
                yield value, value.const_value


def _write_tensors(outside: Mapping[ir.Value, ir.TensorProtocol], folder: Path) -> None:
    """Write the data file, and let each value refer to its place there."""
    with (folder / DATA_FILE).open("wb") as file:
        for value, tensor in outside.items():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            file.write(tensor.tobytes())
            value.const_value = _reference(value, tensor, offset, folder)


def _reference(
    value: ir.Value, tensor: ir.TensorProtocol, offset: int, folder: Path | str = ""
) -> ir.ExternalTensor:
    """``tensor`` as it is stored at ``offset`` of the data file in ``folder``."""
    import onnx_ir  # noqa: PLC0415 - as above

    return onnx_ir.ExternalTensor(
        DATA_FILE,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=onnx_ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
        base_dir=folder,
    )
