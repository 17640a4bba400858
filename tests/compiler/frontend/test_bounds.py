"""Sizes and token ids that no tensor of the checkpoint has room for are refused first."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.frontend.bounds import TensorBounds
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from tests.compiler.frontend.checkpoints import edit_config, refused
from tests.tiny_artifact import write_byte_tokenizer
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 260
BOUNDS = TensorBounds(largest=LARGEST, tensors=20)
LAST = LARGEST + (1 << 20) - 1
HUGE = 4_000_000_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model("smollm", tmp_path_factory.mktemp("sound"), vocab_size=LARGEST)
    return write_byte_tokenizer(folder)


@pytest.fixture
def checkpoint(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "checkpoint")


def test_bounds_of_shapes() -> None:
    assert TensorBounds.of([(3, 5), (7,), ()]) == TensorBounds(largest=7, tensors=3)
    assert TensorBounds.of([]) == TensorBounds(largest=0, tensors=0)


@pytest.mark.parametrize("size", [LARGEST + 1, 10**9, 10**30])
@pytest.mark.parametrize(
    "field",
    [
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ],
)
def test_a_size_above_every_dimension(checkpoint: Path, field: str, size: int) -> None:
    fields: dict[str, Any] = {field: size}
    edit_config(checkpoint, **fields)
    refused(checkpoint, checkpoint.parent, rf"config\.json: field {field} is {size}, and no dim")


@pytest.mark.parametrize("layers", [10**9, 10**30])
def test_more_layers_than_tensors(checkpoint: Path, layers: int) -> None:
    edit_config(checkpoint, num_hidden_layers=layers)
    refused(checkpoint, checkpoint.parent, rf"num_hidden_layers is {layers}, and the weights have")


@pytest.mark.parametrize("positions", [(1 << 22) + 1, 10**12])
def test_a_table_of_positions_has_a_limit(checkpoint: Path, positions: int) -> None:
    edit_config(checkpoint, max_position_embeddings=positions)
    refused(checkpoint, checkpoint.parent, rf"max_position_embeddings is {positions}: lower it to")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "<x>": HUGE}}}),
        ("tokenizer.json", {"model": {"vocab": {"<x>": LAST + 1}}}),
        ("tokenizer.json", {"model": {"vocab": {"<x>": -1}}}),
        ("tokenizer.json", {"model": {"vocab": {"<x>": "7"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": HUGE, "content": "<x>"}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(HUGE): {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "<x>"}}}),
        ("added_tokens.json", {"<x>": HUGE}),
        ("vocab.json", {"<x>": 1.5}),
    ],
)
def test_an_id_beyond_the_model(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"{name}: token '<x>' has the id .*allow 0 to 1,048,83"):
        BOUNDS.check_token_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "<x>": LAST}}}),
        ("tokenizer.json", {"model": {"vocab": [["a", -1.5]]}, "added_tokens": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(LAST): {"content": "<x>"}}}),
        ("added_tokens.json", {"<x>": LAST}),
    ],
)
def test_ids_that_some_model_has(tmp_path: Path, name: str, content: object) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    BOUNDS.check_token_files(tmp_path)


def test_loading_checks_ids_first(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["<x>"] = HUGE
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="token '<x>' has the id 4000000000"):
        load(str(checkpoint), work=checkpoint.parent)
