from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend import gguf as conversion
from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

BYTES = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]
VOCABULARY = ["<unk>", "<s>", "</s>", *BYTES, "ĊĊ", "12"]
MERGES = ["Ċ Ċ", "1 2"]
IDS = np.random.default_rng(31).integers(3, len(VOCABULARY), (2, 8))
PRE = "smollm"


def write(
    path: Path, folder: Path, *, pre: str | None = PRE, tokenizer: str | None = "gpt2"
) -> Path:
    """Write the Llama checkpoint in ``folder`` as float32 GGUF."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(88)
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_key_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    if tokenizer is not None:
        writer.add_tokenizer_model(tokenizer)
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [1] * (len(VOCABULARY) - 3))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = tensor
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # GGUF pairs neighbours for the rotary embedding, transformers pairs halves.
            heads = 6 if "q_proj" in name else 2
            halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
            stored = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_model(
        "llama", tmp_path / "model", vocab_size=len(VOCABULARY), head_dim=8, rms_norm_eps=1e-6
    )


def test_conversion_keeps_the_weights(checkpoint: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", checkpoint)
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
    path = write(tmp_path / "tiny.gguf", checkpoint)
    loaded = load(str(path), work=tmp_path / "work")
    tokenizer = loaded.tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer("a\n\n12", add_special_tokens=False).input_ids
    )
    assert tokens == ["a", "ĊĊ", "1", "2"]
    shipped = Tokenizer.from_file(str(loaded.tokenizer_files()[0]))
    assert shipped.encode("a\n\n12", add_special_tokens=False).tokens == tokens


def test_conversion_is_done_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", checkpoint)
    runs: list[Any] = []
    original = conversion._write

    def counted(*arguments: Any) -> None:  # noqa: ANN401
        runs.append(arguments)
        original(*arguments)

    monkeypatch.setattr(conversion, "_write", counted)
    for _ in range(2):
        load(str(path), work=tmp_path / "work")
    assert len(runs) == 1
    write(path, tiny_model("llama", checkpoint, seed=1, vocab_size=len(VOCABULARY), head_dim=8))
    load(str(path), work=tmp_path / "work")
    assert len(runs) == 2


def test_failed_conversion_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", checkpoint)

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
    path = write(tmp_path / "tiny.gguf", checkpoint)
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
        ({"tokenizer": None}, "carries no tokenizer"),
    ],
)
def test_tokenizer_that_cannot_be_trusted(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    path = write(tmp_path / "tiny.gguf", checkpoint, **options)
    with pytest.raises(ModelError, match=match):
        load(str(path), work=tmp_path / "work")
