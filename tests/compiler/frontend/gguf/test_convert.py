from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.gguf import convert as conversion
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from tests.gguf_files import VOCABULARY, write_gguf
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = np.random.default_rng(31).integers(3, len(VOCABULARY), (2, 8))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model(
        "llama", tmp_path / "model", vocab_size=len(VOCABULARY), head_dim=8, rms_norm_eps=1e-6
    )


def test_conversion_keeps_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint)
    loaded = load(str(path), work=tmp_path / "work")
    assert loaded.folder == tmp_path / "work" / "source"
    original = load_file(checkpoint / "model.safetensors")
    converted = load_file(loaded.folder / "model.safetensors")
    assert converted.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(converted[name], tensor, err_msg=name)
    expected = reference_logits(load_eager(checkpoint, {}), IDS)
    assert_close(GraphSession(loaded.model, tmp_path).logits(IDS), expected, loaded.config)
    assert not (tmp_path / "work" / "source.partial").exists()


def test_pre_tokenizer_is_the_one_that_the_file_names(checkpoint: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint)
    loaded = load(str(path), work=tmp_path / "work")
    tokenizer = loaded.tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("a\n\n12", add_special_tokens=False).input_ids
    )
    assert tokens == ["a", "ĊĊ", "1", "2"]
    shipped = Tokenizer.from_file(str(loaded.write_tokenizer(tokenizer, tmp_path / "out")[0]))
    assert shipped.encode("a\n\n12", add_special_tokens=False).tokens == tokens


def test_conversion_is_done_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint)
    runs: list[Any] = []
    original = conversion._write

    def counted(*arguments: Any) -> None:  # noqa: ANN401
        runs.append(arguments)
        original(*arguments)

    monkeypatch.setattr(conversion, "_write", counted)
    for _ in range(2):
        load(str(path), work=tmp_path / "work")
    assert len(runs) == 1
    write_gguf(
        path, tiny_model("llama", checkpoint, seed=1, vocab_size=len(VOCABULARY), head_dim=8)
    )
    load(str(path), work=tmp_path / "work")
    assert len(runs) == 2
    monkeypatch.setattr(conversion, "_CONVERSION", conversion._CONVERSION + 1)
    load(str(path), work=tmp_path / "work")
    assert len(runs) == 3


def test_failed_conversion_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(str(path), work=tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.gguf does not exist"):
        load(str(tmp_path / "none.gguf"), work=tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file(checkpoint: Path, tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match="is not a complete GGUF file"):
        load(str(path), work=tmp_path / "work")


def test_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(ModelError, match="is not a complete GGUF file"):
        load(str(path), work=tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pre": "new-kind"}, "pre-tokenizer 'new-kind' is not known"),
        ({"pre": None}, "pre-tokenizer 'default' is not known"),
        ({"model": None}, "carries no tokenizer"),
        ({"model": "bert"}, "its tokenizer is of kind 'bert'"),
    ],
)
def test_tokenizer_that_cannot_be_trusted(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in options.items()}
    path = write_gguf(tmp_path / "tiny.gguf", checkpoint, keys=keys)
    with pytest.raises(ModelError, match=match):
        load(str(path), work=tmp_path / "work")
