"""Workloads to time: a prompt, decoding, a batch, a change of adapter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from eoracc.runtime.request import Request

if TYPE_CHECKING:
    from eoracc.runtime.model import Model
    from eoracc.runtime.request import AdapterChoice

__all__ = [
    "DECODE_PROMPT_TOKENS",
    "batch_tokens_per_s",
    "decode_tokens_per_s",
    "first_logprob",
    "first_token_s",
    "prompt_tokens",
]

DECODE_PROMPT_TOKENS = 32
"""Length of the prompt before decoding: short, so that reading weights dominates the cache."""

_TEXT = "Speed does not depend on what a text says, only on how long it is. "


def prompt_tokens(model: Model, length: int) -> list[int]:
    """A prompt of ``length`` tokens of ordinary text, repeated."""
    once = model.tokenizer.encode(_TEXT, special=False)
    return (once * (length // len(once) + 1))[:length]


def first_token_s(model: Model, prompt: Sequence[int], adapter: AdapterChoice) -> float:
    """Seconds from the request to its first token."""
    start = time.perf_counter()
    model.generate(prompt, adapter=adapter, max_new_tokens=1, ignore_end=True)
    return time.perf_counter() - start


def decode_tokens_per_s(
    model: Model, prompt: Sequence[int], new_tokens: int, adapter: AdapterChoice
) -> float:
    """Tokens per second of a single row, after the first token."""
    pieces = model.generate(
        prompt, adapter=adapter, max_new_tokens=new_tokens + 1, ignore_end=True, stream=True
    )
    next(pieces)
    start, made = time.perf_counter(), 0
    for piece in pieces:
        made += len(piece.tokens)
    return made / (time.perf_counter() - start)


def batch_tokens_per_s(
    model: Model, prompt: Sequence[int], new_tokens: int, adapters: Sequence[AdapterChoice]
) -> float:
    """Tokens per second of all rows together, with prompts; one row for each adapter."""
    requests = [
        Request(prompt=prompt, adapter=adapter, max_new_tokens=new_tokens, ignore_end=True)
        for adapter in adapters
    ]
    start = time.perf_counter()
    completions = model.generate_batch(requests)
    made = sum(len(completion.tokens) for completion in completions)
    return made / (time.perf_counter() - start)


def first_logprob(model: Model, prompt: Sequence[int], adapter: AdapterChoice) -> tuple[int, float]:
    """The first token after ``prompt`` and its log-probability, which identify an adapter."""
    completion = model.generate(
        prompt, adapter=adapter, max_new_tokens=1, ignore_end=True, logprobs=0
    )
    ((token, first),) = zip(completion.tokens, completion.logprobs or (), strict=True)
    return token, first.logprob
