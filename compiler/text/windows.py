"""Text to windows of tokens, for calibration and for held-out evaluation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from eoracc.compiler.text.limits import TokenLimits
from eoracc.compiler.text.sources import read_documents
from eoracc.compiler.text.tokens import CHARACTERS_PER_TOKEN, MARGIN, bos_tokens, first_tokens
from eoracc.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from eoracc.compiler.config.sections import CalibrationConfig, HeldOutConfig, TextConfig

__all__ = [
    "Settings",
    "Windows",
    "calibration_windows",
    "checking_window",
    "evaluation_windows",
    "load_windows",
]

_T = TypeVar("_T")


_BLANK = re.compile(r"\s")

_SEPARATOR = "\n\n"
"""Between documents that are packed into one window."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Equally long rows of tokens.

    Attributes:
      input_ids: ``int64 [S, L]``.
      attention_mask: ``int64 [S, L]``, 1 for text, 0 for padding (on the right).
      weights: ``float32 [S]``, the weight of each window's tokens in statistics; None for 1.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.attention_mask.sum())

    def counts(self, vocabulary: int) -> NDArray[np.float64]:
        """How often each token occurs, by weight, without padding: ``[vocabulary]``."""
        weights = self.attention_mask.astype(np.float64)
        if self.weights is not None:
            weights *= self.weights[:, None]
        counts = np.bincount(self.input_ids.ravel(), weights.ravel(), minlength=vocabulary)
        return counts.astype(np.float64)


@dataclass(frozen=True)
class Settings:
    """The user's names of the settings that decide over windows, for messages.

    Attributes:
      samples: of calibration.
      windows: of held-out text.
      offset: tokens that held-out text skips.
      length: of calibration's windows.
      window_length: of the windows of held-out text.
    """

    samples: str = "calibration.samples"
    windows: str = "verify.windows"
    offset: str = "verify.offset_tokens"
    length: str = "calibration.sequence_length"
    window_length: str = "verify.window_length"


def calibration_windows(
    calibration: CalibrationConfig,
    held_out: HeldOutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    limits: TokenLimits | None = None,
    settings: Settings = Settings(),
) -> Windows:
    """The windows of ``calibration``, text by text.

    Random windows avoid held-out text. The weights of a mixture are scaled so that their mean
    over all tokens is 1.

    Args:
      calibration: the section of model.yaml.
      held_out: the text to avoid, where it comes from the same source.
      tokenizer: the model's.
      config_dir: the folder that relative paths are relative to.
      limits: of the model; None checks none.
      settings: names for messages.

    Raises:
      ConfigError: the windows are too long for the model.
      DataError: a text is missing, damaged, empty or too short.
    """
    if limits is not None:
        limits.check_length(settings.length, calibration.sequence_length)
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
            limits=limits,
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
    limits: TokenLimits | None = None,
    settings: Settings = Settings(),
    skip_tokens: int = 0,
) -> Windows:
    """Held-out windows: by default those after the windows of calibration, in the same text.

    Args:
      calibration: whose text is used where ``held_out`` has none of its own.
      held_out: the section of model.yaml.
      tokenizer: the model's.
      config_dir: the folder that relative paths are relative to.
      limits: of the model; None checks none.
      settings: names for messages.
      skip_tokens: to skip beyond those.

    Raises:
      ConfigError: the windows are too long for the model.
      DataError: the text is missing, damaged, empty or too short.
    """
    if limits is not None:
        limits.check_length(settings.window_length, held_out.window_length)
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
        offset_tokens=offset + skip_tokens,
        skip_documents=skipped,
        limits=limits,
        advice=advice,
    )


def checking_window(
    calibration: CalibrationConfig | None,
    held_out: HeldOutConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config_dir: Path,
    limits: TokenLimits | None = None,
) -> Windows | None:
    """The window of held-out text that factors are checked on; None where the text has no more.

    It comes after the windows that fidelity is measured on, which thus have no say in what is
    shipped.

    Args:
      calibration: as for :func:`evaluation_windows`, whose windows have been read already.
      held_out: likewise.
      tokenizer: the model's.
      config_dir: the folder that relative paths are relative to.
      limits: of the model; None checks none.
    """
    try:
        return evaluation_windows(
            calibration,
            held_out.model_copy(update={"windows": 1}),
            tokenizer,
            config_dir=config_dir,
            limits=limits,
            skip_tokens=held_out.windows * held_out.window_length,
        )
    except DataError:
        return None


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
    limits: TokenLimits | None = None,
    advice: str = "calibration.samples",
) -> Windows:
    """Tokenize text into windows.

    If the tokenizer begins a text with BOS, every window begins with it (Gemma needs this). No
    other special token is added.

    Args:
      spec: where the text is.
      tokenizer: the model's.
      config_dir: the folder that a relative ``spec.text`` is relative to.
      samples: ``S``.
      sequence_length: ``L``.
      seed: None takes the first windows (or documents) in order, a number random ones.
      layout: ``packing`` cuts the text into contiguous windows without padding; ``padding`` puts
        one document into each window, cut or padded on the right.
      offset_tokens: packing: tokens to skip first.
      limit_tokens: packing: use at most so many tokens from the start of the text.
      skip_documents: documents to skip first. Blank lines separate the documents of a plain text
        file for padding; for packing it is one document.
      limits: of the model; None checks none.
      advice: the setting to lower where the text is too short.

    Raises:
      DataError: the text is missing, damaged, empty or too short, or has a token that the model has
        no embedding of.
    """
    all_documents = read_documents(
        spec,
        tokenizer,
        config_dir,
        split_text=layout == "padding" or skip_documents > 0,
        separator=_SEPARATOR if layout == "packing" else "",
    )
    documents = islice(all_documents, skip_documents, None)
    bos = bos_tokens(tokenizer)
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
    if limits is not None:
        limits.check_tokens("the tokenizer's beginning of every text", bos, tokenizer)
        for row in chosen:
            limits.check_tokens(spec.text, row, tokenizer)
        # Padding is masked: any row of the embedding does for it.
        pad = pad if pad < limits.rows else 0
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
    tokens = first_tokens(documents, tokenizer, wanted)[:limit]
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
    """Random windows from separate stretches of the text; None where the text is too short.

    Only the windows are tokenized: a small part of a book or of a crawl of the web.
    """
    stretch = (room + 2 * MARGIN) * CHARACTERS_PER_TOKEN
    available = len(text) // stretch
    if available < samples:
        return None
    picked = np.random.default_rng(seed).choice(available, samples, replace=False)
    windows = []
    for index in sorted(int(index) for index in picked):
        start = index * stretch
        # From a blank on, tokens are those of the whole text; so begin at one if it is near.
        blank = _BLANK.search(text, start, start + MARGIN * CHARACTERS_PER_TOKEN)
        begin = start if blank is None else blank.start()
        tokens = first_tokens(iter([text[begin : begin + 2 * stretch]]), tokenizer, room)
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
        # A document may be a book, of which a window needs the beginning only.
        tokens = first_tokens(iter([document]), tokenizer, room)[:room]
        if tokens:
            yield tokens
