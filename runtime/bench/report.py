"""The figures of ``eoracc bench``. Units are in the names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eoracc.runtime.bench.series import Measurement
from eoracc.runtime.bench.start import Start

__all__ = ["AdapterFigures", "BatchFigures", "BenchReport", "SwitchFigures"]


@dataclass(frozen=True, kw_only=True)
class AdapterFigures:
    """One row alone, with one adapter.

    Attributes:
      adapter: its name, or ``none``.
      first_token_ms: from the request to its first token, the whole prompt between.
      prefill_tokens_per_s: tokens of the prompt over that time.
      decode_tokens_per_s: after a short prompt.
      decode_time_ratio: time of a token over that without an adapter in the same round; None for
        ``none``.
    """

    adapter: str
    first_token_ms: Measurement
    prefill_tokens_per_s: Measurement
    decode_tokens_per_s: Measurement
    decode_time_ratio: Measurement | None


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """Several rows at once.

    Attributes:
      rows: requests that are served together.
      adapters: those of the rows, in turn.
      tokens_per_s: new tokens of all rows over the time of all, prompts included.
    """

    rows: int
    adapters: list[str]
    tokens_per_s: Measurement


@dataclass(frozen=True, kw_only=True)
class SwitchFigures:
    """What it costs that a request uses another adapter than the one before.

    Attributes:
      adapter_switch_ms: time of a one-token request just after the switch, less that of the same
        request once more.
      request_ms: time of the request after the switch.
      outputs_differ: whether every two adapters gave different outputs for one prompt, and each
        adapter the same one every time.
    """

    adapter_switch_ms: Measurement
    request_ms: Measurement
    outputs_differ: bool


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All that was measured of an artifact.

    Attributes:
      artifact: its folder.
      digest: of its backbone.
      backend: what ran it.
      device: what that ran on, in words.
      threads: of one operator on the CPU.
      prompt_tokens: of the prompt that ``first_token_ms`` and ``prefill_tokens_per_s`` are for.
      decode_prompt_tokens: of the prompt before decoding and of those in a batch.
      new_tokens: that are decoded.
      repeats: of everything, turn by turn.
      start: a new process.
      adapters: ``none`` first.
      batches: by their rows.
      switch: None where there is nothing to switch between.
    """

    artifact: str
    digest: str
    backend: str
    device: str
    threads: int
    prompt_tokens: int
    decode_prompt_tokens: int
    new_tokens: int
    repeats: int
    start: Start
    adapters: list[AdapterFigures]
    batches: list[BatchFigures]
    switch: SwitchFigures | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
