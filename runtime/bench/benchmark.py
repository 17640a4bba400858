"""``eoracc bench``: all measurements of an artifact, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.backends import BackendChoice
from eoracc.runtime.bench import workloads
from eoracc.runtime.bench.report import AdapterFigures, BatchFigures, BenchReport, SwitchFigures
from eoracc.runtime.bench.series import Measurement, interleave, ratios
from eoracc.runtime.bench.start import measure_start
from eoracc.runtime.model import load
from eoracc.runtime.request import NO_ADAPTER

if TYPE_CHECKING:
    from eoracc.runtime.model import Model, TrustOptions

__all__ = ["BenchOptions", "run_benchmark"]

_BATCH_ROWS = (1, 4, 8)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Options of a benchmark.

    Attributes:
      adapters: to compare with the backbone alone; None for all adapters of the artifact.
      threads: that one operator uses; None for one for each processor available to the process.
      prompt_tokens: length of the long prompt.
      new_tokens: number of tokens to decode.
      repeats: of every measurement.
      backend: that runs the artifact, see :func:`eoracc.runtime.load`.
      trust: likewise.
      digest: likewise.
      public_key: likewise.
    """

    adapters: Sequence[str] | None = None
    threads: int | None = None
    prompt_tokens: int = 512
    new_tokens: int = 128
    repeats: int = 5
    backend: BackendChoice = "auto"
    trust: bool = False
    digest: str | None = None
    public_key: Path | None = None

    def trust_options(self) -> TrustOptions:
        """Which artifact is meant, and whether its code may run."""
        return {"trust": self.trust, "digest": self.digest, "public_key": self.public_key}


def run_benchmark(folder: Path, options: BenchOptions) -> BenchReport:
    """Measure the artifact in ``folder``; the machine should be idle.

    Raises:
      ArtifactError: the folder is damaged or no artifact.
      RequestError: an adapter is unknown, or the tokens exceed the context.
      BackendError: a package, a driver or a GPU is missing, or the backend rejects the model.
    """
    model = load(
        folder, threads=options.threads, backend=options.backend, **options.trust_options()
    )
    adapters = _adapters(model, options.adapters)
    _check_room(model, options)
    start = measure_start(
        folder,
        threads=model.threads,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        backend=model.backend,
        **options.trust_options(),
    )
    if (change := model.folder_watch.check()) is not None:
        raise ArtifactError(f"{folder}: {change.text} after it was loaded: measure it again")
    return BenchReport(
        artifact=str(folder),
        digest=model.manifest.digest,
        backend=model.backend,
        device=model.device,
        threads=model.threads,
        prompt_tokens=options.prompt_tokens,
        decode_prompt_tokens=workloads.DECODE_PROMPT_TOKENS,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        start=start,
        adapters=_rows_alone(model, adapters, options),
        batches=[_batch(model, adapters, rows, options) for rows in _BATCH_ROWS],
        switch=_switch(model, adapters, options) if len(adapters) > 1 else None,
    )


def _adapters(model: Model, wanted: Sequence[str] | None) -> list[str]:
    for name in wanted or ():
        model.bank.check(name)
    return list(dict.fromkeys([NO_ADAPTER, *(model.adapters if wanted is None else wanted)]))


def _check_room(model: Model, options: BenchOptions) -> None:
    needed = max(options.prompt_tokens, workloads.DECODE_PROMPT_TOKENS) + options.new_tokens + 1
    if needed > model.context_length:
        raise RequestError(
            f"{model.folder}: the benchmark needs {needed} tokens, the context has "
            f"{model.context_length}: lower --prompt-tokens or --new-tokens"
        )


def _rows_alone(
    model: Model, adapters: Sequence[str], options: BenchOptions
) -> list[AdapterFigures]:
    long = workloads.prompt_tokens(model, options.prompt_tokens)
    short = workloads.prompt_tokens(model, workloads.DECODE_PROMPT_TOKENS)
    first = interleave(
        {name: partial(workloads.first_token_s, model, long, name) for name in adapters},
        options.repeats,
    )
    decode = interleave(
        {
            name: partial(workloads.decode_tokens_per_s, model, short, options.new_tokens, name)
            for name in adapters
        },
        options.repeats,
    )
    return [
        AdapterFigures(
            adapter=name,
            first_token_ms=Measurement.of([1e3 * seconds for seconds in first[name]]),
            prefill_tokens_per_s=Measurement.of([len(long) / seconds for seconds in first[name]]),
            decode_tokens_per_s=Measurement.of(decode[name]),
            # The ratio of times is the inverse ratio of speeds.
            decode_time_ratio=None
            if name == NO_ADAPTER
            else ratios(decode[NO_ADAPTER], decode[name]),
        )
        for name in adapters
    ]


def _batch(model: Model, adapters: Sequence[str], rows: int, options: BenchOptions) -> BatchFigures:
    # The hard case is a batch in which rows have different adapters.
    turns = [name for name in adapters if name != NO_ADAPTER] or [NO_ADAPTER]
    used = [turns[row % len(turns)] for row in range(rows)]
    prompt = workloads.prompt_tokens(model, workloads.DECODE_PROMPT_TOKENS)
    measure = partial(workloads.batch_tokens_per_s, model, prompt, options.new_tokens, used)
    taken = interleave({rows: measure}, options.repeats)[rows]
    return BatchFigures(rows=rows, adapters=used, tokens_per_s=Measurement.of(taken))


def _switch(model: Model, adapters: Sequence[str], options: BenchOptions) -> SwitchFigures:
    prompt = workloads.prompt_tokens(model, 1)
    expected = {name: workloads.first_logprob(model, prompt, name) for name in adapters}
    after, more, same = [], [], True
    for name in list(adapters) * options.repeats:
        # Every adapter follows another one; its output is checked between the two timed runs.
        seconds = workloads.first_token_s(model, prompt, name)
        same &= workloads.first_logprob(model, prompt, name) == expected[name]
        again = workloads.first_token_s(model, prompt, name)
        after.append(1e3 * seconds)
        more.append(1e3 * (seconds - again))
    return SwitchFigures(
        adapter_switch_ms=Measurement.of(more),
        request_ms=Measurement.of(after),
        outputs_differ=same and len(set(expected.values())) == len(adapters),
    )
