"""Which files hold the weights, what is refused in them, and when the head is tied."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.frontend.weights import is_tied, weight_files
from eoracc.errors import ModelError
from tests.compiler.frontend.checkpoints import edit_config, edit_tensors, refused
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model("llama", tmp_path / "model", num_hidden_layers=1)


def _shard(folder: Path, names: tuple[str, ...] = ("a.safetensors", "b.safetensors")) -> None:
    """Split the weights of ``folder`` over the files ``names``."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[place % len(names)] for place, key in enumerate(sorted(tensors))}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, path)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _equals_eager(folder: Path, work: Path) -> None:
    """Compare the graph with transformers' own reading of ``folder``."""
    tokens = np.random.default_rng(7).integers(3, VOCABULARY, (2, 9))
    loaded = load(str(folder), work=work)
    expected = reference_logits(load_eager(folder, {}), tokens)
    assert_close(GraphSession(loaded.model, work).logits(tokens), expected, loaded.config)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_are_links_out_of_the_folder(
    checkpoint: Path, tmp_path: Path, *, sharded: bool
) -> None:
    if sharded:
        _shard(checkpoint)
    (tmp_path / "blobs").mkdir()
    for path in checkpoint.glob("*.safetensors"):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    _equals_eager(checkpoint, tmp_path)


def test_folder_that_is_a_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(checkpoint)
    assert load(str(tmp_path / "link"), work=tmp_path).digest


def test_shards_in_folders(checkpoint: Path, tmp_path: Path) -> None:
    _shard(checkpoint, ("weights/a.safetensors", "b.safetensors"))
    _equals_eager(checkpoint, tmp_path)


def test_one_file_comes_before_an_index_as_in_transformers(
    checkpoint: Path, tmp_path: Path
) -> None:
    whole = (checkpoint / "model.safetensors").read_bytes()
    edit_tensors(checkpoint, lambda tensors: tensors[EMBEDDING].__imul__(2))
    _shard(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(whole)
    assert weight_files(checkpoint, {}) == [checkpoint / "model.safetensors"]
    _equals_eager(checkpoint, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_file_that_the_configuration_names(
    checkpoint: Path, tmp_path: Path, *, sharded: bool
) -> None:
    own = (checkpoint / "model.safetensors").read_bytes()
    edit_tensors(checkpoint, lambda tensors: tensors[EMBEDDING].__imul__(2))
    name = "other.safetensors"
    if sharded:
        _shard(checkpoint)
        name = "other.safetensors.index.json"
        (checkpoint / INDEX).rename(checkpoint / name)
    else:
        (checkpoint / "model.safetensors").rename(checkpoint / name)
    (checkpoint / "model.safetensors").write_bytes(own)
    edit_config(checkpoint, transformers_weights=name)
    _equals_eager(checkpoint, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "a/../../other/model.safetensors",
        "..\\other\\model.safetensors",
        "/etc/model.safetensors",
        "C:\\model.safetensors",
    ],
)
def test_names_that_lead_out_of_the_folder(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    (checkpoint / "model.safetensors").rename(tmp_path / "other" / "model.safetensors")
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    refused(checkpoint, tmp_path, f"{INDEX}: weight_map names .*is outside of the folder")
    edit_config(checkpoint, transformers_weights=name)
    refused(checkpoint, tmp_path, "transformers_weights names .*is outside of the folder")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "is a list where a JSON object is expected"),
        ("{", "is not valid JSON"),
        ("{}", "is not a valid safetensors index"),
        ('{"weight_map": {}}', "is not a valid safetensors index"),
        ('{"weight_map": {"a": 3}}', "names '3', which is no safetensors file"),
        ('{"weight_map": {"a": "a.bin"}}', "names 'a.bin', which is no safetensors file"),
        ('{"weight_map": {"a": "a-1.safetensors"}}', "a-1.safetensors is missing"),
    ],
)
def test_damaged_index(checkpoint: Path, tmp_path: Path, content: str, match: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / INDEX).write_text(content)
    refused(checkpoint, tmp_path, match)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (None, "model.safetensors.index.json is missing: fetch the checkpoint again"),
        ("pytorch_model.bin", r"as pickle \(pytorch_model.bin\), which is not read"),
        ("model-Q4_K_M.gguf", "give the GGUF file itself, .*model-Q4_K_M.gguf"),
        ("consolidated.safetensors", "consolidated.safetensors is not in transformers' format"),
    ],
)
def test_folder_without_weights(
    checkpoint: Path, tmp_path: Path, name: str | None, match: str
) -> None:
    (checkpoint / "model.safetensors").unlink()
    if name is not None:
        (checkpoint / name).write_bytes(b"")
    refused(checkpoint, tmp_path, match)


def test_weights_that_are_a_broken_link(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.unlink()
    path.symlink_to("../nowhere")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(str(checkpoint), work=tmp_path)


# --- contents of a file ---------------------------------------------------------------------------


def test_truncated_data(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(checkpoint, tmp_path, "is truncated: its header announces")


@pytest.mark.parametrize("size", [0, 5, 40])
def test_truncated_header(checkpoint: Path, tmp_path: Path, size: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(checkpoint, tmp_path, "is truncated inside its header")


def test_trailing_bytes(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    refused(checkpoint, tmp_path, "has 1 bytes that its header does not know")


def test_header_that_is_not_safetensors(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    refused(checkpoint, tmp_path, "header: is a list where a JSON object is expected")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn])
def test_floating_types(checkpoint: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        name: torch.from_numpy(tensor).to(dtype)
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    save_torch(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    _equals_eager(checkpoint, tmp_path)


@pytest.mark.parametrize(("dtype", "name"), [(np.int8, "I8"), (np.bool_, "BOOL")])
def test_weights_that_are_no_numbers(
    checkpoint: Path, tmp_path: Path, dtype: type[Any], name: str
) -> None:
    edit_tensors(
        checkpoint,
        lambda tensors: tensors.update({EMBEDDING: tensors[EMBEDDING].astype(dtype)}),
    )
    refused(checkpoint, tmp_path, f"{EMBEDDING} is of type {name}")


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("SCB", "bitsandbytes"),
        ("weight.absmax", "bitsandbytes"),
        ("weight_scale_inv", "fp8"),
    ],
)
def test_quantized_tensors_without_a_word_in_the_configuration(
    checkpoint: Path, tmp_path: Path, part: str, method: str
) -> None:
    name = f"model.layers.0.mlp.up_proj.{part}"
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: np.zeros(4, np.int32)}))
    refused(checkpoint, tmp_path, rf"{name} belongs to a quantized checkpoint \({method}\)")


# --- tied heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["smollm", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["differs", "equal", "alone"])
def test_tie_follows_the_tensors(family: str, kind: str, tmp_path: Path) -> None:
    folder = tiny_model(family, tmp_path / "model")

    def change(tensors: dict[str, Any]) -> None:
        assert HEAD not in tensors
        tensors[HEAD] = tensors[EMBEDDING].copy()
        if kind == "differs":
            tensors[HEAD][-1, 0] += 1
        if kind == "alone":
            del tensors[EMBEDDING]

    edit_tensors(folder, change)
    _equals_eager(folder, tmp_path)
    loaded = load(str(folder), work=tmp_path)
    wide = [
        value
        for value in loaded.model.graph.initializers.values()
        if value.shape is not None and VOCABULARY in tuple(value.shape)
    ]
    assert len(wide) == (2 if kind == "differs" else 1)
    assert loaded.config.tie_word_embeddings == (kind != "differs")


def test_heads_are_compared_to_the_last_row() -> None:
    embedding = torch.arange(5000.0)[:, None]
    head = embedding.to(torch.float64)
    tensors = {EMBEDDING: embedding, HEAD: head}
    assert is_tied(None, tensors, tie_word_embeddings=True)  # type: ignore[arg-type]
    head[-1] += 1
    assert not is_tied(None, tensors, tie_word_embeddings=True)  # type: ignore[arg-type]


def test_untied_model_without_a_head(checkpoint: Path, tmp_path: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.pop(HEAD))
    refused(checkpoint, tmp_path, "no tensor lm_head.weight.*set tie_word_embeddings to true")
