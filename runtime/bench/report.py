"""The figures of ``eoracc bench``. Units are in the names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from eoracc.runtime.bench.series import Measurement
from eoracc.runtime.bench.start import Start

__all__ = ["AdapterFigures", "BatchFigures", "BenchReport", "SwitchFigures"]


@dataclass(frozen=True, kw_only=True)
class AdapterFigures:
    """Speed of a single row with one adapter.

    Attributes:
      adapter: its name, or ``none``.
      first_token_ms: time from the request with the long prompt to its first token.
      prefill_tokens_per_s: tokens of the prompt divided by that time.
      decode_tokens_per_s: after a short prompt.
      decode_time_ratio: time per token divided by that without an adapter in the same round; None
        for ``none``.
    """

    adapter: str
    first_token_ms: Measurement
    prefill_tokens_per_s: Measurement
    decode_tokens_per_s: Measurement
    decode_time_ratio: Measurement | None


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """Speed of several rows at once.

    Attributes:
      rows: number of requests served together.
      adapters: of the rows, in order.
      tokens_per_s: new tokens of all rows divided by the total time, with prompts.
    """

    rows: int
    adapters: list[str]
    tokens_per_s: Measurement


@dataclass(frozen=True, kw_only=True)
class SwitchFigures:
    """Cost of a request with another adapter than the previous one.

    Attributes:
      adapter_switch_ms: time of a one-token request just after the switch, minus that of the same
        request again.
      request_ms: time of the request just after the switch.
      outputs_differ: whether any two adapters gave different outputs for one prompt, and each
        adapter the same output every time.
    """

    adapter_switch_ms: Measurement
    request_ms: Measurement
    outputs_differ: bool


@dataclass(frozen=True, kw_only=True)
class BenchReport:
    """All measurements of an artifact.

    Attributes:
      artifact: its folder.
      digest: of its backbone.
      backend: that ran it.
      device: description of the CPU or GPU that it ran on.
      threads: that one operator used on the CPU.
      prompt_tokens: length of the prompt of ``first_token_ms`` and ``prefill_tokens_per_s``.
      decode_prompt_tokens: length of the prompt before decoding and of those in a batch.
      new_tokens: number of tokens decoded.
      repeats: of every measurement.
      start: of a new process.
      adapters: ``none`` first.
      batches: by number of rows.
      switch: None without two adapters to switch between.
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
