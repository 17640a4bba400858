from __future__ import annotations

import json
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from eoracc.compiler.frontend import files
from eoracc.compiler.frontend.load import load
from tests.compiler.frontend.checkpoints import lay_out_hub_cache, refused
from tests.tiny_artifact import write_byte_tokenizer
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model")


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path, "nowhere does not exist")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    refused(tmp_path / "model.txt", tmp_path, "neither a model folder nor a .gguf file")


def test_folder_that_is_called_like_a_gguf_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = checkpoint.rename(tmp_path / "model.gguf")
    assert load(str(folder), work=tmp_path).folder == folder


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, tmp_path, "has no config.json")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json", "vocab.json"]
)
@pytest.mark.parametrize(
    ("content", "match"),
    [("{'a': 1}", "is not valid JSON"), ("[" * 99999, "is nested more"), ("3", "JSON object")],
)
def test_file_that_is_no_json(
    checkpoint: Path, tmp_path: Path, name: str, content: str, match: str
) -> None:
    (checkpoint / name).write_text(content)
    refused(checkpoint, tmp_path, rf"{name}: .*{match}.*: fetch it again")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_folder_in_place_of_a_file(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).mkdir()
    refused(checkpoint, tmp_path, f"{name}: is a folder: fetch it again")


@pytest.mark.parametrize("template", [3, [{"name": "a"}], ["a"], {"a": 1}])
def test_chat_template_of_another_type(checkpoint: Path, tmp_path: Path, template: object) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    refused(checkpoint, tmp_path, "field chat_template is neither a template nor a list")


@pytest.mark.parametrize("template", ["a", [{"name": "a", "template": "b"}], {"a": "b"}, None])
def test_chat_templates_that_transformers_reads(
    checkpoint: Path, tmp_path: Path, template: object
) -> None:
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert load(str(checkpoint), work=tmp_path).digest


@pytest.mark.parametrize(
    "content", ["{}", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": null}']
)
def test_tokenizer_that_cannot_be_parsed(checkpoint: Path, tmp_path: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    refused(checkpoint, tmp_path, "tokenizer.json: is no tokenizer that the package tokenizers can")


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["main", "v2"])
def test_hub_id_in_the_cache(checkpoint: Path, tmp_path: Path, cache: Path, revision: str) -> None:
    digest = load(str(checkpoint), work=tmp_path).digest
    snapshot = lay_out_hub_cache(checkpoint, cache, "someone/tiny", revision=revision)
    source = "someone/tiny" + ("" if revision == "main" else f"@{revision}")
    loaded = load(source, work=tmp_path)
    assert loaded.folder == snapshot
    assert loaded.digest == digest
    write_byte_tokenizer(snapshot)
    files = loaded.write_tokenizer(loaded.tokenizer(), tmp_path / "out")
    assert [path.name for path in files][::2] == ["tokenizer.json", "generation_config.json"]


@pytest.mark.parametrize("source", ["someone/other", "someone/tiny@v9", "some one/tiny"])
def test_hub_id_that_is_not_there(
    checkpoint: Path, tmp_path: Path, cache: Path, source: str
) -> None:
    lay_out_hub_cache(checkpoint, cache, "someone/tiny")
    refused(source, tmp_path, f"'{source}' is no local folder and cannot be fetched")


def test_hub_model_is_fetched_without_pickles_and_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
        "additional_chat_templates/tools.jinja",
        "pytorch_model.bin",
        "rng_state.pt",
        "modeling_own.py",
        "consolidated.00.safetensors",
        "original/params.json",
        "onnx/model.safetensors",
    ]
    fetched: list[list[str]] = []

    def download(repository: str, **options: Any) -> str:  # noqa: ANN401 - of huggingface_hub
        assert repository == "someone/tiny"
        assert options.pop("revision") is None
        allowed, ignored = options.pop("allow_patterns"), options.pop("ignore_patterns")
        assert not options
        fetched.append(
            [
                name
                for name in published
                if any(fnmatch(name, pattern) for pattern in allowed)
                and not any(fnmatch(name, pattern) for pattern in ignored)
            ]
        )
        return str(checkpoint)

    monkeypatch.setattr(files, "snapshot_download", download)
    load("someone/tiny", work=tmp_path)
    load("someone/tiny", work=tmp_path, trust_remote_code=True)
    assert fetched == [published[:4], [*published[:4], "modeling_own.py"]]
