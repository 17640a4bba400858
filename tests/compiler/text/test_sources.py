from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.config.sections import TextConfig
from eoracc.compiler.text.windows import load_windows
from eoracc.errors import DataError
from tests.text_windows import read, windows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def test_jsonl_fields_are_packed_with_a_blank_line_between(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = '{"body": "abc"}\n\n{"body": "de\u2028f"}\n{"body": "ghi"}\n'
    found = windows(tmp_path, tokenizer, lines, name="t.jsonl", field="body", samples=1,
                    sequence_length=13)  # fmt: skip
    assert read(tokenizer, found) == ["abc\n\nde\u2028f\n\n"]
    rows = windows(tmp_path, tokenizer, lines, name="t.jsonl", field="body", samples=3,
                   layout="padding")  # fmt: skip
    assert read(tokenizer, rows) == ["abc", "de\u2028f", "ghi"]


def test_chat_messages_go_through_the_template(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    line = json.dumps({"chat": [{"role": "user", "content": "hi"}]})
    found = windows(tmp_path, bos_tokenizer, line, name="c.jsonl", messages="chat", samples=1,
                    sequence_length=20, layout="padding")  # fmt: skip
    # The template's own <s> is not doubled, and </s> is one token.
    assert read(bos_tokenizer, found) == ["<s>user: hi</s>"]
    assert found.input_ids[0, :10].tolist().count(1) == 1
    assert found.input_ids[0, 9] == 2


@pytest.mark.parametrize(
    ("content", "options", "problem"),
    [
        ("", {}, r"text\.txt: is empty: give a text"),
        ("\n \n", {"layout": "padding"}, "is empty"),
        (b"abc\xff" + b"x" * 99, {}, r"text\.txt:1: is not UTF-8 text: convert it"),
        (b"abc\n" * 9 + b"\xff\n" + b"x" * 99, {}, r"text\.txt:10: is not UTF-8 text"),
        ("abc def".encode("utf-16"), {}, r"text\.txt:1: is not UTF-8 text"),
        (b'{"text": "a"}\n{"text": "\xe4"}\n', {"name": "t.jsonl"}, r"t\.jsonl:2: is not UTF-8"),
        ("abc", {"field": "text"}, "is a plain text and has no 'field': remove it"),
        ('{"text": "a"}\n{"text"\n', {"name": "t.jsonl"}, r"t\.jsonl:2: is not valid JSON"),
        ('{"body": "a"}\n', {"name": "t.jsonl"}, r"t\.jsonl:1: has no field 'text', only body"),
        ('{"text": "a"}\n{"text"\n', {"name": "t.JSONL"}, r"t\.JSONL:2: is not valid JSON"),
        ("[" * 99999, {"name": "t.jsonl"}, r"t\.jsonl:1: is nested more than 100"),
        (
            '{"text": ' + "9" * 5000 + "}",
            {"name": "t.jsonl"},
            r"t\.jsonl:1: holds a number of 5,000",
        ),
        (
            '{"text": "a"}\n\n{"text": "b \\ud83d c"}\n',
            {"name": "t.jsonl"},
            r"t\.jsonl:3: 'text' holds half of a surrogate pair, '\\ud83d'",
        ),
        (r'{"\ud83d": 1}', {"name": "t.jsonl"}, r"has no field 'text', only \\ud83d: set"),
        ("[1]\n", {"name": "t.jsonl"}, r"t\.jsonl:1: must be a JSON object"),
        ('{"text": 3}\n', {"name": "t.jsonl"}, r"t\.jsonl:1: field 'text' is no text"),
        ('{"text": ""}\n', {"name": "t.jsonl", "layout": "padding"}, "is empty"),
        ("a\n\nb", {"layout": "padding", "samples": 3}, "holds 2 documents, 3 are needed"),
        (
            '{"chat": []}\n',
            {"name": "t.jsonl", "messages": "chat"},
            "the tokenizer has no chat template for 'chat'",
        ),
        (
            '{"chat": []}\n',
            {"name": "t.jsonl", "messages": "messages"},
            r"has no field 'messages', only chat: set 'messages'",
        ),
    ],
)
def test_texts_that_cannot_be_used(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    content: str | bytes,
    options: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(DataError, match=problem):
        windows(tmp_path, tokenizer, content, **options)


def test_half_a_surrogate_pair_in_a_message(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    line = r'{"chat": [{"role": "user", "content": "\udc00"}]}'
    with pytest.raises(DataError, match=r"t\.jsonl:1: 'chat' holds half of a surrogate pair"):
        windows(tmp_path, bos_tokenizer, line, name="t.jsonl", messages="chat")


def test_nul_is_a_character(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = windows(tmp_path, tokenizer, "a\0b", samples=1, sequence_length=3)
    assert read(tokenizer, found) == ["a\0b"]


def test_messages_that_do_not_fit_the_template(
    tmp_path: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=r"t\.jsonl:1: 'chat' does not fit the chat template"):
        windows(tmp_path, bos_tokenizer, '{"chat": 3}', name="t.jsonl", messages="chat")


def test_missing_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("nowhere.txt", "./nowhere", "/nowhere/at/all"):
        with pytest.raises(DataError, match=f"{name}: there is no such text"):
            load_windows(
                TextConfig(text=name), tokenizer, config_dir=tmp_path, samples=1, sequence_length=2
            )


def test_missing_datasets_package_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("org/name", "."):
        with pytest.raises(DataError, match=f"{name}: data sets need .*: pip install datasets"):
            load_windows(
                TextConfig(text=name), tokenizer, config_dir=tmp_path, samples=1, sequence_length=2
            )


def test_dataset_rows_are_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, bool]] = []

    def load_dataset(
        source: str, split: str, *, streaming: bool, trust_remote_code: bool
    ) -> Iterator[dict[str, str]]:
        assert not trust_remote_code  # older releases run scripts of a repository
        asked.append((source, split, streaming))
        if split != "test":
            raise ValueError("Unknown split\n'train'")
        return iter([{"body": "abcd"}, {"body": "efgh"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    spec = TextConfig(text="org/name", field="body", split="test")
    found = load_windows(spec, tokenizer, config_dir=tmp_path, samples=2, sequence_length=5)
    assert read(tokenizer, found) == ["abcd\n", "\nefgh"]
    assert asked == [("org/name", "test", True)]
    with pytest.raises(DataError, match="split 'train' of this data set cannot be read: Unknown"):
        load_windows(
            TextConfig(text="org/name"),
            tokenizer,
            config_dir=tmp_path,
            samples=1,
            sequence_length=5,
        )


def test_saved_datasets_are_opened_as_such(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "abcd"}, {"text": "efgh"}]
    saved = {str(tmp_path / "one"): rows, str(tmp_path / "splits"): {"train": rows}}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_from_disk=saved.__getitem__))
    for name, marker in (("one", "dataset_info.json"), ("splits", "dataset_dict.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / marker).touch()
        found = load_windows(
            TextConfig(text=name), tokenizer, config_dir=tmp_path, samples=2, sequence_length=5
        )
        assert read(tokenizer, found) == ["abcd\n", "\nefgh"]


def test_parquet_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.table({"text": ["abcd", "efgh"]}), tmp_path / "set" / "train.parquet")
    found = load_windows(
        TextConfig(text="set"), tokenizer, config_dir=tmp_path, samples=2, sequence_length=5
    )
    assert read(tokenizer, found) == ["abcd\n", "\nefgh"]
