"""ONNX files as data: their nodes and the files that they name. Runs and opens nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eoracc.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx

__all__ = ["MODEL_FILE", "all_nodes", "external_files", "parse_onnx"]

MODEL_FILE = "model.onnx"
"""A graph in an artifact: at its root, or in the folder of a target."""

_GRAPHS = ("g", "graphs")
_TENSORS = ("t", "tensors")
_SPARSE = ("sparse_tensor", "sparse_tensors")


def parse_onnx(content: bytes, path: Path) -> onnx.ModelProto:
    """The model in ``content``; weights in other files are not read.

    Args:
      content: of an ONNX file.
      path: of the file, for errors.

    Raises:
      ArtifactError: it is no ONNX file.
    """
    import onnx  # noqa: PLC0415 - takes a tenth of a second

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # noqa: BLE001 - protobuf's own error has no type stubs
        raise ArtifactError(f"{path}: is no ONNX model: build the artifact again") from None
    return model


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node: of the graph, of graphs in attributes, and of functions."""
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def external_files(model: onnx.ModelProto) -> set[str]:
    """Paths of the files that hold tensors, as the model names them."""
    return {
        entry.value
        for tensor in _tensors(model)
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    waiting = [model.graph]
    for training in model.training_info:
        waiting += [training.initialization, training.algorithm]
    for function in model.functions:
        for attribute in _attributes(function):
            waiting += _items(attribute, _GRAPHS)
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += _items(attribute, _GRAPHS)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    holders = [(graph.initializer, graph.sparse_initializer) for graph in _graphs(model)]
    attributes = [attribute for node in all_nodes(model) for attribute in node.attribute]
    attributes += [
        attribute for function in model.functions for attribute in function.attribute_proto
    ]
    holders += [(_items(item, _TENSORS), _items(item, _SPARSE)) for item in attributes]
    for dense, sparse in holders:
        yield from dense
        for tensor in sparse:
            yield tensor.values
            yield tensor.indices


def _attributes(function: onnx.FunctionProto) -> Iterator[onnx.AttributeProto]:
    yield from function.attribute_proto
    for node in function.node:
        yield from node.attribute


def _items(attribute: onnx.AttributeProto, fields: tuple[str, str]) -> list[Any]:
    """Values of a field that holds one and of a field that holds several."""
    single, several = fields
    found = [getattr(attribute, single)] if attribute.HasField(single) else []
    return [*found, *getattr(attribute, several)]
