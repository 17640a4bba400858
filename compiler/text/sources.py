"""Read the documents of a text: plain files, JSON lines, data sets of the hub or on disk."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from eoracc.compiler.text.tokens import bos_tokens
from eoracc.documents import Reader
from eoracc.errors import DataError, reason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from eoracc.compiler.config.sections import TextConfig

__all__ = ["read_documents"]

_READER = Reader(DataError, "mend or remove the record", constants=True, half_pairs=True)


def read_documents(
    spec: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    config_dir: Path,
    *,
    split_text: bool,
    separator: str,
) -> Iterator[str]:
    """The documents of a text, in order.

    Args:
      spec: where the text is.
      tokenizer: its chat template formats ``spec.messages``.
      config_dir: the folder that a relative ``spec.text`` is relative to.
      split_text: split a plain text file at blank lines into documents; otherwise its content comes
        in pieces of arbitrary size.
      separator: appended to each document, except to pieces and to chats, whose template ends them.

    Raises:
      DataError: the text is missing or damaged.
    """
    path = config_dir / Path(spec.text).expanduser()
    if path.is_file() and path.suffix.lower() != ".jsonl":
        for key in ("field", "messages", "split"):
            if getattr(spec, key) is not None:
                raise DataError(
                    f"{spec.text}: is a plain text and has no '{key}': remove it from model.yaml"
                )
        if split_text:
            yield from (paragraph + separator for paragraph in _paragraphs(path))
        else:
            yield from _pieces(path)
        return
    if path.is_file():
        records = _jsonl(path)
    elif path.is_dir() or _may_be_dataset_id(spec.text):
        records = _dataset(spec, path)
    else:
        raise DataError(
            f"{spec.text}: there is no such text: give a file, a data set folder or a hub id"
        )
    for where, record in records:
        text = _record_text(spec, where, record, tokenizer)
        # A chat template ends its last turn itself.
        yield text if spec.messages is not None else text + separator


def _pieces(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        while piece := file.read(1 << 20):
            yield piece


def _paragraphs(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        for blank, lines in groupby(file, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(lines).rstrip("\n")


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        line = _undecodable_line(path)
        raise DataError(f"{path}:{line}: is not UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _undecodable_line(path: Path) -> int:
    """The first line of ``path``, from 1, that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            yield f"{path}:{number}", _READER.parse(line, f"{path}:{number}")


def _may_be_dataset_id(text: str) -> bool:
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).suffix


def _dataset(spec: TextConfig, path: Path) -> Iterator[tuple[str, object]]:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise DataError(
            f"{spec.text}: data sets need the package 'datasets': pip install datasets"
        ) from None
    split = spec.split or "train"
    try:
        saved = (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()
        if saved:
            loaded = datasets.load_from_disk(str(path))
            rows = loaded[split] if (path / "dataset_dict.json").exists() else loaded
        else:
            source = str(path) if path.is_dir() else spec.text
            rows = datasets.load_dataset(
                source, split=split, streaming=True, trust_remote_code=False
            )
        # Inside the try, since a streamed set is read, and can fail, only here.
        for number, record in enumerate(rows):
            yield f"{spec.text}, record {number}", record
    except Exception as error:  # the package raises whatever its file systems and readers raise
        cause = reason(error) or type(error).__name__
        raise DataError(
            f"{spec.text}: split '{split}' of this data set cannot be read: {cause}"
        ) from error


def _record_text(
    spec: TextConfig, where: str, record: object, tokenizer: PreTrainedTokenizerBase
) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object with a field of text")
    key = spec.messages or spec.field or "text"
    if key not in record:
        option = "messages" if spec.messages else "field"
        raise DataError(f"{where}: has no field '{key}', only {_names(record)}: set '{option}'")
    value = record[key]
    if spec.messages is None:
        if not isinstance(value, str):
            raise DataError(
                f"{where}: field '{key}' is no text: set 'field', or 'messages' for chat"
            )
        return _checked(where, key, value)
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the tokenizer has no chat template for '{key}': use 'field' with text"
        )
    try:
        text = str(tokenizer.apply_chat_template(value, tokenize=False))
    except Exception as error:  # templates raise their own complaints, through jinja's classes
        raise DataError(
            f"{where}: '{key}' does not fit the chat template: {reason(error)}"
        ) from error
    _checked(where, key, text)
    # Windows begin with BOS already where the tokenizer has one.
    return text.removeprefix(tokenizer.bos_token) if bos_tokens(tokenizer) else text


def _names(record: dict[str, object]) -> str:
    # A key may hold half of a surrogate pair, which cannot be printed.
    return ", ".join(record).encode(errors="backslashreplace").decode()


def _checked(where: str, key: str, text: str) -> str:
    """``text`` itself, unless it holds half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: '{key}' holds half of a surrogate pair, {text[error.start]!a}, which is no "
            "character: repair the record or take it out"
        ) from None
    return text
