"""Single linears of an artifact, each in a session of its own, for the parity check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.errors import ArtifactError
from eoracc.plugins.functions.overload import local_function
from eoracc.plugins.op import DOMAIN, Input
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.graph_file import read_graph, stored_array
from eoracc.runtime.artifact.graph_names import LINEARS_KEY
from eoracc.runtime.onnxruntime.inference import DTYPES, open_inference
from eoracc.runtime.onnxruntime.native_library import native_path

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["open_linears"]

_FUSED_ATTRIBUTES = ("activation", "norm_epsilon")


def open_linears(
    folder: Path, names: Sequence[str], *, library: Path | bool = True, threads: int | None = None
) -> Iterator[Callable[[Mapping[int, NDArray[np.float32]]], NDArray[np.float32]]]:
    """Open single linears of the artifact, with their stored operands.

    Args:
      folder: the artifact.
      names: of the linears.
      library: see :func:`eoracc.runtime.onnxruntime.session.open_session`.
      threads: likewise.

    Yields:
      For each name a function from inputs by width, ``{K: [rows, K]}``, to the linear's outputs,
      ``float32 [rows, N]``, without the fused parts: norm, bias, activation, residual.

    Raises:
      ArtifactError: a linear is unknown.
      BackendError: ONNX Runtime is missing or rejects the op.
    """
    files = read_model_files(folder)
    model = read_graph(files.model)
    places = {
        name: (node, part)
        for node in model.graph
        if node.domain == DOMAIN
        for part, name in enumerate(_linear_names(node))
    }
    native = native_path(library)
    opened: tuple[ir.Node, Any] | None = None
    for name in names:
        if name not in places:
            raise ArtifactError(f"{files.model}: has no linear '{name}'")
        node, part = places[name]
        if opened is None or opened[0] is not node:  # merged linears are adjacent
            proto = ir.to_proto(_single(model, node)).SerializeToString()
            opened = node, open_inference(proto, native, threads, f"{folder}: {name}")
        sizes = node.attributes.get_ints("parts", ()) if len(_linear_names(node)) > 1 else ()
        start = sum(sizes[:part])
        rows = slice(start, start + sizes[part]) if sizes else slice(None)
        yield partial(_run_linear, opened[1], node.attributes["K"].as_int(), rows)


def _linear_names(node: ir.Node) -> list[str]:
    return node.metadata_props.get(LINEARS_KEY, str(node.name)).split(",")


def _single(model: ir.Model, node: ir.Node) -> ir.Model:
    """A model of ``node`` alone with its weights, without the parts fused with its linears."""
    source = node.inputs[0]
    dtype = (source.dtype if source is not None else None) or ir.DataType.FLOAT
    x = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(["rows", None]))
    operands: list[ir.Value | None] = [x]
    # The norm and all inputs after it are fusions. The linear of the graph has no bias either:
    # another node adds it there.
    for position, value in enumerate(node.inputs[1 : Input.norm_weight], start=1):
        if value is None or position == Input.bias:
            operands.append(None)
            continue
        try:
            array = stored_array(value)
        except (OSError, ValueError) as error:  # the file is missing, or a link to elsewhere
            raise ArtifactError(
                f"{value.name}: cannot be read: {error}: copy or build the artifact again"
            ) from error
        if array is None:
            raise ArtifactError(f"node {node.name}: its operand {value.name} is no initializer")
        operands.append(ir.Value(name=value.name, const_value=ir.tensor(array, name=value.name)))
    while operands[-1] is None:
        operands.pop()
    attributes = [a for a in node.attributes.values() if a.name not in _FUSED_ATTRIBUTES]
    single = ir.Node(node.domain, node.op_type, operands, attributes, name=node.name)
    # The artifact's function body is for its own combination of fused parts.
    alike = len(attributes) == len(node.attributes) and [value is None for value in operands] == [
        value is None for value in node.inputs
    ]
    function = model.functions[node.op_identifier()] if alike else local_function(single)
    single.overload = function.overload
    y = single.outputs[0]
    y.name, y.type = "y", ir.TensorType(dtype)
    graph = ir.Graph(
        [x],
        [y],
        nodes=[single],
        initializers=[value for value in operands[1:] if value is not None],
        opset_imports=dict(model.opset_imports),
        name="linear",
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=[function])


def _run_linear(
    inference: Any,  # noqa: ANN401 - onnxruntime has no types
    width: int,
    rows: slice,
    inputs: Mapping[int, NDArray[np.float32]],
) -> NDArray[np.float32]:
    dtype = DTYPES[inference.get_inputs()[0].type]
    outputs: NDArray[np.generic] = inference.run(None, {"x": inputs[width].astype(dtype)})[0]
    return outputs[:, rows].astype(np.float32, copy=False)
