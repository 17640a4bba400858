from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.frontend.gguf.generation import end_tokens, sampling
from eoracc.compiler.frontend.gguf.reading import GgufFile
from eoracc.compiler.frontend.gguf.tokenizer import read_vocabulary
from tests.gguf_files import VOCABULARY, write_gguf
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = [*VOCABULARY, "<|im_end|>", "<|endoftext|>"]
TURN, TEXT = len(TOKENS) - 2, len(TOKENS) - 1
TYPES = [3] * 3 + [1] * (len(TOKENS) - 5) + [3, 3]
CHATML = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return tiny_model("llama", folder, vocab_size=len(TOKENS), head_dim=8)


def opened(checkpoint: Path, folder: Path, keys: dict[str, Any]) -> GgufFile:
    return GgufFile(
        write_gguf(folder / "m.gguf", checkpoint, tokens=TOKENS, types=TYPES, keys=keys)
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [2]),
        ({"tokenizer.ggml.eot_token_id": 5}, [2, 5]),
        ({"tokenizer.ggml.eot_token_id": 2}, [2]),
        ({"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}, [2, 5, 6]),
        ({"tokenizer.ggml.eos_token_id": None}, []),
        ({"tokenizer.chat_template": CHATML}, [2, TURN]),
        ({"tokenizer.chat_template.tool_use": CHATML}, [2, TURN]),
        ({"tokenizer.chat_template": CHATML, "tokenizer.ggml.eos_token_id": TURN}, [TURN]),
    ],
)
def test_end_tokens(
    keys: dict[str, Any], expected: list[int], checkpoint: Path, tmp_path: Path
) -> None:
    assert end_tokens(read_vocabulary(opened(checkpoint, tmp_path, keys))) == expected


def test_text_that_is_no_control_token_ends_nothing(checkpoint: Path, tmp_path: Path) -> None:
    keys = {
        "tokenizer.chat_template": CHATML,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
    }
    assert end_tokens(read_vocabulary(opened(checkpoint, tmp_path, keys))) == [2]


def test_sampling(checkpoint: Path, tmp_path: Path) -> None:
    keys = {
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.75,
        "general.sampling.min_p": 0.125,
        "general.sampling.penalty_repeat": 1.25,
    }
    assert sampling(opened(checkpoint, tmp_path, keys)) == {
        "temperature": 0.5,
        "top_k": 20,
        "top_p": 0.75,
        "min_p": 0.125,
        "repetition_penalty": 1.25,
        "do_sample": True,
    }
    assert sampling(opened(checkpoint, tmp_path, {})) == {}
    greedy = opened(checkpoint, tmp_path, {"general.sampling.temp": 0.0})
    assert sampling(greedy) == {"do_sample": False}


def test_written_file(checkpoint: Path, tmp_path: Path) -> None:
    from eoracc.compiler.frontend.gguf.convert import convert

    keys = {
        "tokenizer.chat_template": CHATML,
        "general.sampling.temp": 0.5,
        "general.sampling.top_k": 20,
    }
    file = opened(checkpoint, tmp_path, keys)
    folder = convert(file.path, tmp_path / "source")
    written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert written["eos_token_id"] == [2, TURN]
    assert (written["temperature"], written["top_k"], written["do_sample"]) == (0.5, 20, True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == [2, TURN]
    assert config["bos_token_id"] == 1
    assert config["pad_token_id"] is None
