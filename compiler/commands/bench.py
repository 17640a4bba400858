"""``eoracc bench``: speed, start-up time, memory and the cost of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import (
    PATH,
    backend_option,
    json_option,
    make_console,
    make_table,
    print_json,
    say,
    trust_options,
)

if TYPE_CHECKING:
    from eoracc.runtime import BackendChoice
    from eoracc.runtime.bench import BenchReport
    from eoracc.runtime.bench.series import Measurement

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["bench"]


@click.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME",
    help="Adapter to compare; may be repeated. Default: all adapters of ARTIFACT.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Threads of one operator; default: one per processor.",
)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@backend_option
@trust_options
@json_option
def bench(
    artifact: Path,
    *,
    adapters: tuple[str, ...],
    threads: int | None,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    backend: BackendChoice,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Measure the speed of ARTIFACT, its start-up time and the cost of its adapters."""
    from eoracc.runtime.bench import BenchOptions, run_benchmark

    report = run_benchmark(
        artifact,
        BenchOptions(
            adapters=adapters or None,
            threads=threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            backend=backend,
            trust=trust,
            digest=digest,
            public_key=public_key,
        ),
    )
    if as_json:
        print_json(report.as_dict())
    else:
        _show(report)


def _show(report: BenchReport) -> None:
    from eoracc.compiler.report.lines import format_bytes

    console = make_console()
    say(
        f"{report.artifact}, {report.backend} on {report.device}; "
        f"median of {report.repeats} (quartiles)"
    )
    alone = make_table("one request alone")
    alone.add_column("adapter", no_wrap=True)
    prefill = f"prefill {report.prompt_tokens}"
    for heading in ("decode\ntokens/s", "time /\nnone", f"{prefill}\ntokens/s", "first token\nms"):
        alone.add_column(heading, justify="right", no_wrap=True)
    for adapter in report.adapters:
        ratio = adapter.decode_time_ratio
        alone.add_row(
            adapter.adapter,
            _text(adapter.decode_tokens_per_s, ".0f"),
            "" if ratio is None else f"{ratio.median:.3f}",
            _text(adapter.prefill_tokens_per_s, ".0f"),
            _text(adapter.first_token_ms, ".0f"),
        )
    console.print(alone)
    batches = make_table(
        f"requests of {report.decode_prompt_tokens} + {report.new_tokens} tokens served together"
    )
    for heading in ("rows", "all rows, tokens/s"):
        batches.add_column(heading, justify="right", no_wrap=True)
    batches.add_column("adapters, in turn")
    for batch in report.batches:
        used = ", ".join(dict.fromkeys(batch.adapters))
        batches.add_row(str(batch.rows), _text(batch.tokens_per_s, ".0f"), used)
    console.print(batches)
    start, switch = report.start, report.switch
    held, most = format_bytes(start.loaded_memory_bytes), format_bytes(start.peak_memory_bytes)
    lines = [f"load in a new process: {start.load_s:.2f} s, {held} held then, {most} at most"]
    if start.device_memory_bytes is not None:
        lines.append(f"memory of the GPU after that: {format_bytes(start.device_memory_bytes)}")
    if switch is not None:
        lines.append(
            f"adapter switch: {_text(switch.adapter_switch_ms, '.3f')} ms in a request of "
            f"{switch.request_ms.median:.2f} ms; outputs "
            f"{'differ by adapter' if switch.outputs_differ else 'DO NOT DIFFER BY ADAPTER'}"
        )
    for line in lines:
        say(line)


def _text(one: Measurement, form: str) -> str:
    return f"{one.median:{form}} ({one.low:{form}} … {one.high:{form}})"
