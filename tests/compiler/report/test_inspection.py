from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from eoracc.compiler.report.inspection import ArtifactSummary, CheckpointSummary, inspect_path
from eoracc.errors import EoraccError
from tests.tiny_artifact import reseal

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"b": np.zeros((3, 5), np.float32)}, folder / "model-00001.safetensors")
    save_file({"a": np.zeros(4, np.float16)}, folder / "model-00002.safetensors")
    return folder


def test_safetensors_folder(checkpoint: Path) -> None:
    summary = inspect_path(checkpoint)
    assert isinstance(summary, CheckpointSummary)
    found = [(t.name, t.shape, t.dtype, t.bytes, t.file) for t in summary.tensors]
    assert found == [
        ("b", (3, 5), "F32", 60, "model-00001.safetensors"),
        ("a", (4,), "F16", 8, "model-00002.safetensors"),
    ]
    assert (summary.parameters, summary.bytes) == (19, 68)
    assert json.loads(json.dumps(summary.as_dict()))["kind"] == "checkpoint"


def test_gguf_file(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    summary = inspect_path(tmp_path / "m.gguf")
    assert isinstance(summary, CheckpointSummary)
    (tensor,) = summary.tensors
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.bytes) == (
        "token_embd.weight",
        (3, 32),
        "F32",
        384,
    )


def test_artifact(tiny_artifact: Path) -> None:
    summary = inspect_path(tiny_artifact)
    assert isinstance(summary, ArtifactSummary)
    assert [one.name for one in summary.report.linears][-1] == "lm_head"
    one = summary.report.linears[0]
    assert (one.bits, one.group_size, one.rank) == (3, 16, 2)
    total = sum(path.stat().st_size for path in tiny_artifact.iterdir())
    assert summary.folder_bytes == summary.report.folder_bytes == total
    content = json.loads(json.dumps(summary.as_dict()))
    assert content["folder_bytes"] == sum(content["folder_kinds"].values()) == total
    compressed = [linear for linear in content["linears"] if linear["block"] is not None]
    assert len(compressed) == len(content["linears"]) - 1
    assert all(linear["bits"] is not None for linear in content["linears"])
    assert content["warnings"] == summary.report.as_dict()["warnings"]
    assert content["linear_bytes"] == sum(linear["bytes"] for linear in compressed)
    weights = sum(linear["shape"][0] * linear["shape"][1] for linear in compressed)
    assert content["bits_per_weight"] == pytest.approx(8 * content["linear_bytes"] / weights)


def test_artifact_with_a_damaged_report(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    for text in ("{}", '{"fidelity": {}}', '{"fidelity": []}'):
        (folder / "report.json").write_text(text)
        with pytest.raises(EoraccError, match=r"report\.json: its content is not what manifest"):
            inspect_path(folder)
        reseal(folder)
        with pytest.raises(EoraccError, match=r"report\.json: .*build the artifact again$"):
            inspect_path(folder)
    (folder / "report.json").unlink()
    with pytest.raises(EoraccError, match=r"report\.json: is missing"):
        inspect_path(folder)


def test_things_that_are_neither(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "m.gguf").write_bytes(b"GGUF\3\0\0\0 but not really")
    whole = (checkpoint / "model-00001.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "short.safetensors").write_bytes(whole[:20])
    (tmp_path / "long.safetensors").write_bytes(b"\xff" * 16)
    for name, problem in (
        ("nowhere", "there is no such file or folder"),
        ("empty", "holds neither manifest.json nor .safetensors files"),
        ("notes.txt", "is neither an artifact nor a checkpoint folder nor a .gguf file"),
        ("m.gguf", "is not a complete GGUF file"),
        ("cut.safetensors", "is truncated: its header announces"),
        ("short.safetensors", "is truncated inside its header"),
        ("long.safetensors", "is truncated inside its header"),
    ):
        with pytest.raises(EoraccError) as caught:
            inspect_path(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {problem}")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("fidelity", "rows", 0, "perplexity"), "many"),
        (("fidelity", "rows", 0, "bytes"), {}),
        (("fidelity", "rows", 0, "kl"), [0.1]),
        (("fidelity", "exceeded"), 3),
        (("linears", 0, "bytes"), {}),
        (("linears", 0, "shape"), [1, None]),
        (("linears", 0, "errors"), {"eora": "small"}),
        (("build", "passes"), [{"name": "eora"}]),
        (("build", "precisions"), [1]),
        (("build", "wall_s"), None),
        (("adapters", "perplexity"), {"math": [1.0]}),
        (("adapters", "original"), []),
        (("parity",), {"passed": True, "logits": [{"max_error": 1.0, "tolerance": 0.0}]}),
        (("parity",), [1]),
        (("linears", 0, "shape"), ["96", "48"]),
        (("surveys",), [{"pass": "eora"}]),
        (("surveys",), [{"pass": "allocate", "alternatives": 1}]),
        (("targets",), {"tensorrt": {"engines": {"89": {"size": "big"}}}}),
        (("chat",), {"notes": 1}),
        (("tokenizer",), {"onnxruntime_genai": {"other_tokens": 1}}),
    ],
)
def test_parts_of_a_report_of_another_type(
    tiny_artifact: Path, tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    path = folder / "report.json"
    content = json.loads(path.read_text())
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.unlink()
    path.write_text(json.dumps(content))
    reseal(folder)
    with pytest.raises(EoraccError, match=r"report\.json: .*build the artifact again$"):
        inspect_path(folder)
