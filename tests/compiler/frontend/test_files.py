from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from eoracc.compiler.frontend import files
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def _refused(source: Path | str, work: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        load(str(source), work=work)
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", tmp_path, "nowhere does not exist")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    _refused(tmp_path / "model.txt", tmp_path, "neither a model folder nor a .gguf file")


def test_folder_without_config(tmp_path: Path) -> None:
    _refused(tmp_path, tmp_path, "has no config.json")


@pytest.mark.parametrize(
    ("content", "match"), [("{", "is not valid JSON"), ("{}", "has no field model_type")]
)
def test_damaged_config(checkpoint: Path, tmp_path: Path, content: str, match: str) -> None:
    (checkpoint / "config.json").write_text(content)
    _refused(checkpoint, tmp_path, match)


def test_folder_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    _refused(checkpoint, tmp_path, "holds no weights: model.safetensors or")


def test_pickled_weights_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    _refused(checkpoint, tmp_path, r"as pickle \(pytorch_model.bin\), which is not read")


def test_missing_shard(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(checkpoint, tmp_path, "model-00001-of-00002.safetensors is missing")


def test_damaged_index(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    _refused(checkpoint, tmp_path, "is not a valid safetensors index")


def test_truncated_data(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refused(checkpoint, tmp_path, "is truncated: its header announces")


@pytest.mark.parametrize("size", [0, 5, 40])
def test_truncated_header(checkpoint: Path, tmp_path: Path, size: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _refused(checkpoint, tmp_path, "is truncated inside its header")


def test_trailing_bytes(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    _refused(checkpoint, tmp_path, "has 1 bytes that its header does not know")


def test_header_that_is_not_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    _refused(checkpoint, tmp_path, "has a header that is not safetensors")


def test_hub_model_is_fetched_without_pickles(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, patterns=allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr(files, "snapshot_download", download)
    assert load("someone/tiny", work=tmp_path).folder == checkpoint
    assert asked["repository"] == "someone/tiny"
    assert "*.safetensors" in asked["patterns"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["patterns"])


def test_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nand more lines")

    monkeypatch.setattr(files, "snapshot_download", download)
    _refused("someone/tiny", tmp_path, "'someone/tiny' is no local folder and cannot be fetched")
