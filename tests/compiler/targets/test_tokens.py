"""The shipped tokenizer is held against transformers', and genai's against both."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.report.lines import tokenizer_lines
from eoracc.compiler.targets import tokens
from eoracc.compiler.targets.tokens import ShippedTokenizer, ship_tokenizer, tokenizer_report
from eoracc.errors import ModelError
from eoracc.runtime.parity.tokens import TOKENS_FILE, read_token_cases
from tests.tokenizer_zoo import ZOO

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SAME = ("gpt2", "llama3", "o200k", "starcoder_digits")
"""Members that genai reads as tokenizers does."""


def loaded(folder: Path, member: str) -> LoadedModel:
    nothing: Any = None
    return LoadedModel(
        model=nothing,
        folder=ZOO[member](folder / "model"),
        config=nothing,
        generation=None,
        digest="",
    )


def shipped(folder: Path, member: str, held_out: Sequence[str] = ()) -> ShippedTokenizer:
    model = loaded(folder, member)
    return ship_tokenizer(model, model.tokenizer(), folder / "out", held_out=held_out)


def report(folder: Path, member: str) -> dict[str, Any]:
    tokenizer = shipped(folder, member)
    output = folder / "out"
    section = {
        "type": "llama",
        "vocab_size": 400,
        "context_length": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "decoder": {"filename": "model.onnx"},
    }
    (output / "genai_config.json").write_text(json.dumps({"model": section, "search": {}}))
    return tokenizer_report(output, tokenizer, ["onnxruntime"])


@pytest.mark.parametrize("member", ZOO)
def test_every_kind_can_be_shipped(tmp_path: Path, member: str) -> None:
    tokenizer = shipped(tmp_path, member, ["Some held-out text. " * 30, "More."])
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", TOKENS_FILE}
    recorded = read_token_cases(tmp_path / "out")
    assert [*tokenizer.cases[: len(recorded)]] == recorded
    assert [case.text for case in tokenizer.cases[len(recorded) :]][-1] == "More."


def test_other_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tmp_path, "gpt2")
    tokenizer = model.tokenizer()
    call = type(tokenizer).__call__

    def lower(self: Any, text: str, **options: Any) -> Any:  # noqa: ANN401
        return call(self, text.lower(), **options)

    monkeypatch.setattr(type(tokenizer), "__call__", lower)
    with pytest.raises(ModelError, match=r"does not say all of its tokenizer .*'Hello world'"):
        ship_tokenizer(model, tokenizer, tmp_path / "out")


def test_held_out_text_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tmp_path, "gpt2")
    tokenizer = model.tokenizer()
    call = type(tokenizer).__call__

    def strange(self: Any, text: str, **options: Any) -> Any:  # noqa: ANN401
        return call(self, text.replace("rare", "x"), **options)

    monkeypatch.setattr(type(tokenizer), "__call__", strange)
    ship_tokenizer(model, tokenizer, tmp_path / "out", held_out=["common " * 3000])
    with pytest.raises(ModelError, match="does not say all"):
        ship_tokenizer(model, tokenizer, tmp_path / "out", held_out=["common " * 3000 + "rare"])


def test_rendered_chats_are_compared(tmp_path: Path) -> None:
    model = loaded(tmp_path, "gpt2")
    tokenizer = model.tokenizer()
    before = len(ship_tokenizer(model, tokenizer, tmp_path / "out").cases)
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    tokenizer.chat_template = template
    cases = ship_tokenizer(model, tokenizer, tmp_path / "out").cases[before:]
    assert len(cases) == 2
    assert all(case.tokens[0] == 1 and 2 in case.tokens for case in cases)
    # A template that knows no system role still renders the user's turns.
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + template
    )
    assert len(ship_tokenizer(model, tokenizer, tmp_path / "out").cases) == before + 1


@pytest.mark.parametrize("member", SAME)
def test_nothing_is_said_of_equals(tmp_path: Path, member: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    found = report(tmp_path, member)
    assert found["onnxruntime_genai"]["texts"] > 30
    assert found["onnxruntime_genai"]["other_tokens"] == 0
    assert tokenizer_lines(found) == []


@pytest.mark.parametrize(
    ("member", "line"),
    [
        ("gpt2_prefix_space", "other tokens"),
        ("qwen2_nfc", "other tokens for .* texts .'caf\u00e9 "),
        ("nfkc_lowercase", "other tokens"),
        ("deepseek", "cannot use it .Invalid regex"),
        ("metaspace_first", "other tokens"),
        ("added_single_word", "other tokens"),
        ("unigram_first", "cannot use it"),
    ],
)
def test_what_genai_does_otherwise_is_said(tmp_path: Path, member: str, line: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    (found,) = tokenizer_lines(report(tmp_path, member))
    assert re.match(f"tokenizer: unmodified onnxruntime-genai .*{line}", found), found


def test_other_targets_do_not_ask_genai(tmp_path: Path) -> None:
    tokenizer = shipped(tmp_path, "deepseek")
    assert tokenizer_report(tmp_path, tokenizer, ["tensorrt"])["onnxruntime_genai"] == {}


def test_a_class_that_does_not_follow_the_file_is_noted(tmp_path: Path) -> None:
    model = loaded(tmp_path, "starcoder_digits")
    assert ship_tokenizer(model, model.tokenizer(), tmp_path / "out").notes == []
    config = model.folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"tokenizer_class": "GPT2Tokenizer"}))
    (note,) = ship_tokenizer(model, model.tokenizer(), tmp_path / "out").notes
    assert "transformers' GPT2Tokenizer, whose tokens are used, does not follow this file" in note
    assert tokenizer_lines({"notes": [note]}) == [f"note: {note}"]


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_genai_does_not_open_a_template_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    template = "{# " + "long " * 2000 + "#}"
    text = template if file.endswith(".jinja") else json.dumps({"chat_template": template})
    (tmp_path / file).write_text(text)
    # Without a tokenizer's class: opening one would be an AttributeError.
    monkeypatch.setattr(tokens, "import_package", lambda _name: object())
    assert tokens.compare_with_genai(tmp_path, []) == {"refused": "its chat template is too long"}
