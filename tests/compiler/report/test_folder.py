"""The bytes of a folder by kind, next to those of the arrays that the graph reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import onnx
import pytest

from eoracc.compiler.report.folder import KINDS, folder_kinds, with_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eoracc.compiler.report.content import Report


def graph(*tensors: tuple[str, int, int], nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A graph whose initializers, ``(name, offset, bytes)``, are in model.onnx.data."""
    made = onnx.GraphProto(node=nodes)
    for name, offset, length in tensors:
        tensor = made.initializer.add(name=name)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    return onnx.ModelProto(graph=made)


def fused(*inputs: str) -> onnx.NodeProto:
    return onnx.helper.make_node("MatMulNBitsLowRank", inputs, ["y"], domain="eoracc")


BLOCK = "model.layers.0.mlp.up_proj"


def test_tensors_are_what_they_are_read_as() -> None:
    model = graph(
        (f"{BLOCK}.B", 0, 1000),
        (f"{BLOCK}.scales", 1000, 100),
        (f"{BLOCK}.lora_a", 1100, 20),
        (f"{BLOCK}.lora_b_scale", 1120, 4),
        ("norm.weight", 1124, 8),
        ("lm_head.B", 1132, 2000),
        ("lm_head.scales", 3132, 200),
        ("cos_cache", 3332, 64),
        nodes=[
            fused(
                "x",
                f"{BLOCK}.B",
                f"{BLOCK}.scales",
                "",
                "",
                f"{BLOCK}.lora_a",
                "",
                "",
                f"{BLOCK}.lora_b_scale",
                "norm.weight",
            ),
            fused("x", "lm_head.B", "lm_head.scales"),
            onnx.helper.make_node("Gather", ["cos_cache", "positions"], ["cos"]),
        ],
    )
    sizes = {"model.onnx.data": 4096, "model.onnx": 500}
    assert folder_kinds(sizes, model) == {
        "linears": 1100,
        "factors": 24,
        "embedding_and_head": 2200,
        "other_tensors": 8 + 64 + (4096 - 3396),  # the last are what aligns tensors
        "graph": 500,
    }


def test_a_table_that_is_stored_in_another_form_or_shared_counts_once() -> None:
    node = onnx.helper.make_node
    model = graph(
        ("model.embed_tokens.weight", 0, 3000),
        ("lm_head.same_bytes", 0, 3000),
        (f"{BLOCK}.weight", 3000, 700),
        nodes=[
            node("Cast", ["model.embed_tokens.weight"], ["table"], to=1),
            node("Gather", ["table", "input_ids"], ["hidden"]),
            node("Transpose", ["lm_head.same_bytes"], ["head"]),
            node("MatMul", ["hidden", "head"], ["logits"]),
            node("Transpose", [f"{BLOCK}.weight"], ["up"]),
            node("MatMul", ["hidden", "up"], ["y"]),
        ],
    )
    assert folder_kinds({"model.onnx.data": 3700}, model) == {
        "linears": 700,
        "embedding_and_head": 3000,
    }


def test_every_file_has_a_kind() -> None:
    files = {
        "genai_config.json": "graph",
        "tokenizer.json": "tokenizer",
        "chat_template.jinja": "tokenizer",
        "libeoracc_ops.so": "library",
        "report.json": "checking",
        "parity.safetensors": "checking",
        "tokens.json": "checking",
        "manifest.json": "checking",
        "adapters/math.onnx_adapter": "adapters",
        "tensorrt_rtx/model.onnx.data": "tensorrt",
    }
    for name, kind in files.items():
        assert folder_kinds({name: 7}, None) == {kind: 7}
    assert set(files.values()) <= KINDS.keys()


def test_the_kinds_of_an_artifact_are_all_of_its_bytes(tiny_artifact: Path) -> None:
    sizes = {
        path.relative_to(tiny_artifact).as_posix(): path.stat().st_size
        for path in tiny_artifact.rglob("*")
        if path.is_file()
    }
    model = onnx.load(tiny_artifact / "model.onnx", load_external_data=False)
    kinds = folder_kinds(sizes, model)
    assert sum(kinds.values()) == sum(sizes.values())
    whole = onnx.load(tiny_artifact / "model.onnx")
    found = {tensor.name: len(tensor.raw_data) for tensor in whole.graph.initializer}
    table = [size for name, size in found.items() if name.startswith("lm_head.")]
    assert kinds["embedding_and_head"] == sum(table) > 0
    factors = {name: size for name, size in found.items() if ".lora_" in name}
    outside = {t.name for t in model.graph.initializer if t.external_data}
    assert kinds["factors"] == sum(factors[name] for name in factors.keys() & outside) > 0


def test_rows_differ_by_their_parameters(report: Report) -> None:
    original, shipped = report.fidelity.rows
    rows = [replace(original, bytes=shipped.bytes + 900), shipped]
    found = with_folder(
        replace(report, fidelity=replace(report.fidelity, rows=rows)), {"model.onnx": 5000}, None
    )
    assert [row.folder_bytes for row in found.fidelity.rows] == [5900, 5000]
    assert (found.folder_bytes, found.folder_kinds) == (5000, {"graph": 5000})


@pytest.mark.parametrize("kinds", [{"linears": "many"}, [1]])
def test_only_numbers_by_kind_are_read_back(report: Report, kinds: object) -> None:
    content = {**report.as_dict(), "folder_kinds": kinds}
    with pytest.raises(ValueError, match="folder_kinds"):
        type(report).from_dict(content)
