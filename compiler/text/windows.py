"""Text to windows of tokens, for calibration and for held-out evaluation."""

from __future__ import annotations

import importlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO, TypeVar

import numpy as np

from eoracc.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from eoracc.compiler.config.sections import CalibrationConfig, HeldOutConfig, TextConfig

__all__ = ["Settings", "Windows", "calibration_windows", "evaluation_windows", "load_windows"]

_T = TypeVar("_T")

_CHARACTERS_PER_TOKEN = 6
"""First guess at how much text holds the tokens that are asked for; doubled until it does."""

_MARGIN = 64
"""Last tokens of a cut text, thrown away: what follows the cut could have changed them.

Tokenizers decide within a word, or a run of blanks, and its neighbours, never far ahead.
"""

_BLANK = re.compile(r"\s")

_SEPARATOR = "\n\n"
"""Between documents that are packed, and between the documents of a plain text file."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Equally long rows of tokens.

    Attributes:
      input_ids: ``int64 [S, L]``.
      attention_mask: ``int64 [S, L]``, 1 for text, 0 for padding (on the right).
      weights: ``float32 [S]``, what each token of a window counts for in statistics; None for 1.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that are text."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Settings:
    """What a user calls the settings that decide over windows, for messages.

    Attributes:
      samples: of calibration.
      windows: of held-out text.
      offset: tokens that held-out text skips.
    """

    samples: str = "calibration.samples"
    windows: str = "verify.windows"
    offset: str = "verify.offset_tokens"


def calibration_windows(
    calibration: CalibrationConfig,
    held_out: HeldOutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    settings: Settings = Settings(),
) -> Windows:
    """The windows that ``calibration`` asks for, those of one text after those of another.

    Random ones stay clear of held-out text. The weights of a mixture are scaled so that their mean
    over all tokens is 1.

    Args:
      calibration: what is asked for.
      held_out: what must stay unseen, where it comes from the same text.
      tokenizer: the model's.
      config_dir: what relative paths are relative to.
      settings: names for messages.

    Raises:
      DataError: a text is missing, damaged, empty or too short.
    """
    limit = held_out.offset_tokens if held_out.text is None else None
    parts = [
        load_windows(
            text,
            tokenizer,
            config_dir=config_dir,
            samples=text.samples or calibration.samples,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            layout=calibration.layout,
            limit_tokens=limit if calibration.seed is not None else None,
            advice=settings.samples,
        )
        for text in calibration.texts()
    ]
    if calibration.mixture is None:
        return parts[0]
    weights = [text.weight for text in calibration.texts()]
    tokens = [part.tokens for part in parts]
    mean = np.average(weights, weights=tokens)
    return Windows(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.attention_mask for part in parts]),
        np.repeat(np.array(weights) / mean, [len(part.input_ids) for part in parts]).astype(
            np.float32
        ),
    )


def evaluation_windows(
    calibration: CalibrationConfig | None,
    held_out: HeldOutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    settings: Settings = Settings(),
) -> Windows:
    """Held-out windows: in the calibration text, by default, what follows its windows.

    Args:
      calibration: whose text is used where ``held_out`` has none of its own.
      held_out: what is asked for.
      tokenizer: the model's.
      config_dir: what relative paths are relative to.
      settings: names for messages.

    Raises:
      DataError: the text is missing, damaged, empty or too short.
    """
    offset, skipped = held_out.offset_tokens or 0, 0
    advice = settings.windows + (f" or {settings.offset}" if offset else "")
    if held_out.text is None and held_out.offset_tokens is None and calibration is not None:
        if calibration.layout == "padding":
            skipped = calibration.samples
        else:
            offset = calibration.samples * calibration.sequence_length
        advice = f"{settings.samples} or {settings.windows}"
    return load_windows(
        held_out.held_out_text(calibration),
        tokenizer,
        config_dir=config_dir,
        samples=held_out.windows,
        sequence_length=held_out.window_length,
        offset_tokens=offset,
        skip_documents=skipped,
        advice=advice,
    )


def load_windows(
    spec: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    samples: int,
    sequence_length: int,
    seed: int | None = None,
    layout: Literal["packing", "padding"] = "packing",
    offset_tokens: int = 0,
    limit_tokens: int | None = None,
    skip_documents: int = 0,
    advice: str = "calibration.samples",
) -> Windows:
    """Tokenize text into windows.

    No special tokens are added but one: where the tokenizer begins a text with BOS (Gemma does,
    and is lost without), so does every window.

    Args:
      spec: where the text is.
      tokenizer: the model's.
      config_dir: what a relative ``spec.text`` is relative to.
      samples: ``S``.
      sequence_length: ``L``.
      seed: None takes the first windows (or documents) in order, a number random ones.
      layout: ``packing`` cuts the text into contiguous windows without padding; ``padding`` puts
        one document a window, cut or padded on the right.
      offset_tokens: packing: tokens to skip first.
      limit_tokens: packing: tokens, from the start of the text, that may be used at most.
      skip_documents: documents to skip first. A plain text file's are parted by blank lines for
        padding, and it is one document for packing.
      advice: the setting to lower where the text is too short.

    Raises:
      DataError: the text is missing, damaged, empty or too short.
    """
    found = _documents(
        spec,
        tokenizer,
        config_dir,
        split_text=layout == "padding" or skip_documents > 0,
        separator=_SEPARATOR if layout == "packing" else "",
    )
    documents = islice(found, skip_documents, None)
    bos = _bos(tokenizer)
    room = sequence_length - len(bos)
    if layout == "padding":
        rows = _rows(documents, tokenizer, room)
        chosen = _choose(spec, rows, samples=samples, seed=seed, unit="documents", advice=advice)
    else:
        chosen = _pack(
            spec,
            documents,
            tokenizer,
            samples=samples,
            room=room,
            seed=seed,
            offset=offset_tokens,
            limit=limit_tokens,
            advice=advice,
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = np.full((samples, sequence_length), pad, np.int64)
    mask = np.zeros((samples, sequence_length), np.int64)
    for index, row in enumerate(chosen):
        tokens = [*bos, *row]
        ids[index, : len(tokens)] = tokens
        mask[index, : len(tokens)] = 1
    return Windows(ids, mask)


def _pack(
    spec: TextConfig,
    documents: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    room: int,
    seed: int | None,
    offset: int,
    limit: int | None,
    advice: str,
) -> list[list[int]]:
    needed = offset + samples * room
    if seed is not None and limit is None and offset == 0:
        text = "".join(documents)
        scattered = _scattered(text, tokenizer, samples=samples, room=room, seed=seed)
        if scattered is not None:
            return scattered
        documents = iter([text])
    # Random windows come from all of the text; the first ones need only its beginning.
    wanted = needed if seed is None else limit
    tokens = _first_tokens(documents, tokenizer, wanted)[:limit]
    if not tokens:
        raise DataError(f"{spec.text}: is empty: give a text")
    if len(tokens) < needed:
        where = "holds" if limit is None else "may give calibration, before the held-out part,"
        raise DataError(
            f"{spec.text}: {where} {len(tokens)} tokens, {needed} are needed: "
            f"give more text or lower {advice}"
        )
    starts = range(offset, len(tokens) - room + 1, room)
    chosen = _choose(spec, starts, samples=samples, seed=seed, unit="windows", advice=advice)
    return [tokens[start : start + room] for start in chosen]


def _scattered(
    text: str, tokenizer: PreTrainedTokenizerBase, *, samples: int, room: int, seed: int
) -> list[list[int]] | None:
    """Random windows, each of a stretch of its own; None where the text is too short for that.

    Only what the windows hold is tokenized: of a book, or of a crawl of the web, next to nothing.
    """
    stretch = (room + 2 * _MARGIN) * _CHARACTERS_PER_TOKEN
    available = len(text) // stretch
    if available < samples:
        return None
    picked = np.random.default_rng(seed).choice(available, samples, replace=False)
    windows = []
    for index in sorted(int(one) for one in picked):
        start = index * stretch
        # From the first blank on, if one is near, tokens are those of the whole text.
        blank = _BLANK.search(text, start, start + _MARGIN * _CHARACTERS_PER_TOKEN)
        begin = start if blank is None else blank.start()
        tokens = _first_tokens(iter([text[begin : begin + 2 * stretch]]), tokenizer, room)
        if len(tokens) < room:
            return None
        windows.append(tokens[:room])
    return windows


def _choose(
    spec: TextConfig,
    items: Iterable[_T],
    *,
    samples: int,
    seed: int | None,
    unit: str,
    advice: str,
) -> list[_T]:
    """The first ``samples`` of ``items``, or random ones, in the order of the text."""
    available = list(items if seed is not None else islice(items, samples))
    if not available:
        raise DataError(f"{spec.text}: is empty: give a text")
    if len(available) < samples:
        raise DataError(
            f"{spec.text}: holds {len(available)} {unit}, {samples} are needed: "
            f"give more text or lower {advice}"
        )
    if seed is None:
        return available
    picked = np.random.default_rng(seed).choice(len(available), samples, replace=False)
    return [available[index] for index in sorted(picked)]


def _rows(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, room: int
) -> Iterator[list[int]]:
    for document in documents:
        # A document may be a book; a window never needs all of it.
        tokens = _first_tokens(iter([document]), tokenizer, room)[:room]
        if tokens:
            yield tokens


def _first_tokens(
    pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> list[int]:
    """At least the first ``wanted`` tokens of the joined pieces; all of them for None.

    Equal to tokenizing everything and cutting, but reads and tokenizes only what is needed.
    """
    text, ended = "", False
    target = None if wanted is None else max(wanted + _MARGIN, 1) * _CHARACTERS_PER_TOKEN
    parts: list[str] = []
    size = 0
    while True:
        while not ended and (target is None or size <= target):
            piece = next(pieces, None)
            if piece is None:
                ended = True
            else:
                parts.append(piece)
                size += len(piece)
        text = "".join(parts)
        whole = ended and (target is None or size <= target)
        tokens = _encode(tokenizer, text if whole else text[:target])
        if whole:
            return tokens
        if wanted is not None and len(tokens) - _MARGIN >= wanted:
            return tokens[:-_MARGIN]
        assert target is not None  # noqa: S101 - everything is read at once for None
        target *= 2


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        return []
    # verbose=False: a text longer than the model's context is no mistake here.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: ``[bos]`` or nothing."""
    bos = tokenizer.bos_token_id
    first = list(tokenizer("a")["input_ids"])[:1]
    return [int(bos)] if bos is not None and first == [bos] else []


def _documents(
    spec: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    config_dir: Path,
    *,
    split_text: bool,
    separator: str,
) -> Iterator[str]:
    """Documents of ``spec``, each followed by ``separator``; a plain text unsplit in pieces."""
    path = config_dir / Path(spec.text).expanduser()
    if path.is_file() and path.suffix != ".jsonl":
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
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text: convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with _reading(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: is not JSON: {error.msg}") from None
            yield f"{path}:{number}", record


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
            rows = datasets.load_dataset(source, split=split, streaming=True)
        # Inside the try, since a streamed set is read, and can fail, only here.
        for number, record in enumerate(rows):
            yield f"{spec.text}, record {number}", record
    except Exception as error:  # the package raises whatever its file systems and readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{spec.text}: split '{split}' of this data set cannot be read: {reason}"
        ) from error


def _record_text(
    spec: TextConfig, where: str, record: object, tokenizer: PreTrainedTokenizerBase
) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where}: must be a JSON object with a field of text")
    key = spec.messages or spec.field or "text"
    if key not in record:
        option = "messages" if spec.messages else "field"
        raise DataError(
            f"{where}: has no field '{key}', only {', '.join(map(str, record))}: set '{option}'"
        )
    value = record[key]
    if spec.messages is None:
        if not isinstance(value, str):
            raise DataError(
                f"{where}: field '{key}' is no text: set 'field', or 'messages' for chat"
            )
        return value
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: the tokenizer has no chat template for '{key}': use 'field' with text"
        )
    try:
        text = str(tokenizer.apply_chat_template(value, tokenize=False))
    except Exception as error:  # templates raise their own complaints, through jinja's classes
        raise DataError(f"{where}: '{key}' does not fit the chat template: {error}") from error
    # Windows begin with BOS already where the tokenizer has one.
    return text.removeprefix(tokenizer.bos_token) if _bos(tokenizer) else text
