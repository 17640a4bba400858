"""The bytes of an artifact's folder by kind: what they are spent on."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from eoracc.passes.graph.linears import block_of
from eoracc.plugins.op import DENSE_OP, DOMAIN, FACTORS, FUSED_OP, GATHER_OP, DenseInput, Input
from eoracc.runtime.artifact.genai_files import CONFIG_FILE
from eoracc.runtime.artifact.manifest import ADAPTERS_FOLDER, MANIFEST_FILE, REPORT_FILE
from eoracc.runtime.artifact.signature import SIGNATURE_FILE
from eoracc.runtime.parity.record import PARITY_FILE
from eoracc.runtime.parity.tokens import TOKENS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx

    from eoracc.compiler.report.content import Report

__all__ = ["KINDS", "folder_kinds", "with_folder"]

KINDS: Mapping[str, str] = {
    "linears": "linears",
    "factors": "factors",
    "embedding_and_head": "embedding and head",
    "other_tensors": "other tensors",
    "graph": "graph",
    "tokenizer": "tokenizer",
    "library": "library",
    "checking": "checking",
    "adapters": "adapters",
    "tensorrt": "TensorRT",
}
"""Each kind with its name in tables.

``linears``, those of the decoder blocks: codes, scales, zero points and biases, or plain weights.
``other_tensors``: norms, position tables, and what aligns tensors. ``graph``: nodes, small tensors
and the configuration. ``tokenizer``: chat templates included. ``checking``: the manifest, its
signature, the report and the records of parity and tokens, which no token needs.
"""

_CHECKING = frozenset((MANIFEST_FILE, SIGNATURE_FILE, REPORT_FILE, PARITY_FILE, TOKENS_FILE))
_TENSORRT = ("tensorrt/", "tensorrt_rtx/")

_WEIGHT: frozenset[int] = frozenset((Input.B, Input.scales, Input.zero_points, Input.bias))
_PLACES: Mapping[str, tuple[frozenset[int], frozenset[int]]] = {
    FUSED_OP: (frozenset(FACTORS), _WEIGHT),
    DENSE_OP: (frozenset(tuple(DenseInput)[DenseInput.lora_a :]), frozenset({DenseInput.weight})),
}
"""Inputs of an op that hold factors, and those that hold its weight."""
_TABLE = frozenset((Input.B, Input.scales, Input.zero_points))

_VIEWS = frozenset(("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"))
"""Operators whose result is the same tensor in another form."""

_RANKED = ("embedding_and_head", "linears", "factors")
"""The first of these that a tensor is for counts."""

_Consumers = dict[str, list[tuple["onnx.NodeProto", int]]]


def folder_kinds(sizes: Mapping[str, int], model: onnx.ModelProto | None) -> dict[str, int]:
    """Divide the bytes of a folder into :data:`KINDS`.

    Args:
      sizes: bytes of each file by its path in the folder.
      model: model.onnx at the root, without its weights; None where there is none.

    Returns:
      Bytes by kind; their sum is that of ``sizes``. Kinds without any are left out.
    """
    kinds: dict[str, int] = defaultdict(int)
    tensors = {} if model is None else _tensor_kinds(model)
    for name, size in sizes.items():
        parts = tensors.get(name)
        if parts is None:
            kinds[_file_kind(name)] += size
            continue
        for kind, part in parts.items():
            kinds[kind] += part
        kinds["other_tensors"] += size - sum(parts.values())
    return {kind: kinds[kind] for kind in KINDS if kinds[kind]}


def with_folder(report: Report, sizes: Mapping[str, int], model: onnx.ModelProto | None) -> Report:
    """``report`` with the bytes of the folder that it is part of.

    The last row of fidelity is what is shipped. The bytes of the other rows are those of the same
    folder with their own parameters.

    Args:
      report: without them.
      sizes: see :func:`folder_kinds`.
      model: see :func:`folder_kinds`.
    """
    total = sum(sizes.values())
    fidelity = report.fidelity
    shipped = fidelity.rows[-1].bytes if fidelity.rows else 0
    rows = [replace(row, folder_bytes=total + row.bytes - shipped) for row in fidelity.rows]
    return replace(
        report,
        fidelity=replace(fidelity, rows=rows),
        folder_bytes=total,
        folder_kinds=folder_kinds(sizes, model),
    )


def _file_kind(name: str) -> str:
    """The kind of a whole file."""
    if name in _CHECKING:
        return "checking"
    if name.startswith(f"{ADAPTERS_FOLDER}/"):
        return "adapters"
    if name.startswith(_TENSORRT):
        return "tensorrt"
    if name.endswith((".so", ".dylib", ".dll")):
        return "library"
    if name.endswith(".onnx") or name == CONFIG_FILE:
        return "graph"
    return "other_tensors" if name.endswith(".data") else "tokenizer"


def _tensor_kinds(model: onnx.ModelProto) -> dict[str, dict[str, int]]:
    """Bytes by file and kind of the initializers that are stored outside of model.onnx."""
    consumers: _Consumers = defaultdict(list)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            consumers[name].append((node, index))
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seen = set()
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in place:
            continue
        key = place["location"], place.get("offset", "0")
        if key not in seen:  # tensors may share their bytes
            seen.add(key)
            kind = _tensor_kind(tensor.name, consumers)
            found[place["location"]][kind] += int(place.get("length", "0"))
    return found


def _tensor_kind(name: str, consumers: _Consumers) -> str:
    """The kind of an initializer, by the nodes that read it."""
    in_block = block_of(name) is not None
    kinds = {_operand_kind(node, index, name, in_block) for node, index in _uses(name, consumers)}
    return next((kind for kind in _RANKED if kind in kinds), "other_tensors")


def _uses(name: str, consumers: _Consumers) -> list[tuple[onnx.NodeProto, int]]:
    """The nodes that read a value, or another form of it, and the positions of their inputs."""
    found, waiting = [], [name]
    while waiting:
        for node, index in consumers.get(waiting.pop(), ()):
            if node.op_type in _VIEWS and node.domain == "" and index == 0:
                waiting += node.output
            else:
                found.append((node, index))
    return found


def _operand_kind(node: onnx.NodeProto, index: int, name: str, in_block: bool) -> str:
    """The kind of the input ``index`` of a node, which reads the initializer ``name``."""
    if node.domain == DOMAIN and node.op_type in (FUSED_OP, DENSE_OP):
        factors, weight = _PLACES[node.op_type]
        if index in factors:
            return "factors" if in_block else "embedding_and_head"
        if index in weight:
            return "linears" if in_block else "embedding_and_head"
    elif node.domain == DOMAIN and node.op_type == GATHER_OP:
        if index in _TABLE:
            return "embedding_and_head"
    elif node.op_type == "MatMul" and index == 1:
        return "linears" if in_block else "embedding_and_head"
    # Cosine and sine tables are gathered from too.
    elif node.op_type == "Gather" and index == 0 and name.endswith(".weight"):
        return "embedding_and_head"
    return "other_tensors"
