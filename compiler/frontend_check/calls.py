"""The ways in which the check calls a model, and how many tokens it may spend on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eoracc.compiler.frontend.rope_parameters import rope_sections

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

__all__ = ["Call", "calls_for", "original_positions", "window_of"]

_PROMPT = 24
"""Tokens of a prompt that need not pass anything."""

_BEYOND = 8
"""Tokens of a prompt that passes a window or the original positions, after the last one inside."""

_CHUNK = 4
"""Tokens after a made-up cache."""

_PROMPT_PRODUCTS = 2 * 10**10
"""Multiplications in the linears of the blocks that a prompt may cost: half a second or so."""

_PROMPT_TOKENS = 1024
"""Tokens of a prompt at most: eager attention holds a score for each pair of them."""

_PROMPT_LOGITS = 1 << 25
"""Logits of a row at most: 128 MiB."""

_CACHE_BYTES = 1 << 29
"""Size of a made-up cache at most."""

_FLOAT_BYTES = 4
_ANY_LENGTH = 1 << 20
_SEED = 0


@dataclass(frozen=True)
class Call:
    """One way of calling a decoder.

    Attributes:
      name: for errors; ``in ...``.
      lengths: tokens per row; shorter rows are padded on the right.
      steps: tokens of each run, one after another through the cache.
      past: tokens of a cache of random keys and values that the call begins with.
    """

    name: str
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    past: int = 0

    def tokens(self, vocabulary: int) -> NDArray[np.int64]:
        """Random tokens, ``int64 [rows, longest row]``; the same each time."""
        generator = np.random.default_rng([_SEED, len(self.lengths), self.past])
        return generator.integers(0, vocabulary, (len(self.lengths), max(self.lengths)))

    def mask(self) -> NDArray[np.int64]:
        """``int64 [rows, past + longest row]``, 1 for valid tokens."""
        valid = np.arange(max(self.lengths))[None] < np.array(self.lengths)[:, None]
        return np.pad(valid.astype(np.int64), ((0, 0), (self.past, 0)), constant_values=1)

    def cache(self, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Random keys or values of the cache.

        Args:
          name: of the graph's input, which seeds them.
          shape: heads and their size.

        Returns:
          ``float32 [rows, heads, past, size]``.
        """
        heads, size = shape
        generator = np.random.default_rng([_SEED, *name.encode()])
        return generator.standard_normal((len(self.lengths), heads, self.past, size), np.float32)

    @property
    def last_position(self) -> int:
        """Of any token of the call."""
        return self.past + max(self.lengths) - 1


def calls_for(
    config: PretrainedConfig, *, block_parameters: int, cached_elements: int
) -> list[Call]:
    """The calls that show whether the graph of ``config`` computes what the eager model does.

    Args:
      config: of the model.
      block_parameters: weights of all decoder blocks: what a token costs.
      cached_elements: numbers that the cache holds for a token, keys and values of all blocks.

    Returns:
      A prompt and a step on its cache, and a batch of two lengths. Then, for the sliding window and
      for the positions of the original training, if there are any, a few tokens on a cache that is
      longer; prompts themselves pass them where that is cheap. No call goes beyond the model's
      positions.
    """
    positions = int(getattr(config, "max_position_embeddings", None) or _ANY_LENGTH)
    passed = sorted(
        {length for length in (window_of(config), original_positions(config)) if length}
    )
    affordable = min(
        _PROMPT_TOKENS,
        _PROMPT_PRODUCTS // block_parameters,
        _PROMPT_LOGITS // int(config.vocab_size),
        positions - 1,
    )
    prompt = max(1, min(_PROMPT, positions - 1))
    for length in passed:
        if length + _BEYOND <= affordable:
            prompt = max(prompt, length + _BEYOND)
    calls = [
        Call("a prompt and a step on its cache", (prompt + 1,), (prompt, 1)),
        Call("a batch of two lengths", (prompt, max(1, prompt // 4)), (prompt,)),
    ]
    return calls + [
        Call(f"tokens after a cache of {length}", (_CHUNK,), (_CHUNK,), past=length)
        for length in passed
        if length + _CHUNK <= positions and length * cached_elements * _FLOAT_BYTES <= _CACHE_BYTES
    ]


def window_of(config: PretrainedConfig) -> int:
    """Keys that a query of a layer with a sliding window sees; 0 where no layer has one."""
    return int(getattr(config, "sliding_window", None) or 0)


def original_positions(config: PretrainedConfig) -> int:
    """Positions of the training before the context was extended; 0 where it was not."""
    own = getattr(config, "original_max_position_embeddings", None)
    lengths = [
        own,
        *(section.get("original_max_position_embeddings") for section in rope_sections(config)),
    ]
    return int(next((length for length in lengths if length), 0))
