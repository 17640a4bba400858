"""Measure the cost of adapters at run time, on artifacts that take them.

    python -m benchmarks.adapters LABEL=ARTIFACT [...] [--kind TYPE:RANK ...] [--threads N]
                                  [--prompt-tokens N] [--new-tokens N] [--repeats N] [--json FILE]

For each kind of factors (default: ``int8:16`` and ``int4:16``) a copy of the artifact gets two
adapters with random factors for every slot, and ``eoracc bench`` runs on it in a process of its
own. Speed does not depend on the values of the factors. The bars: a switch below 5 ms, and decoding
with an adapter of rank 16 at most 3% slower than without.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_line
from eoracc.errors import EoraccError
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.plugins.adapters import AdapterSlots
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest

KINDS = ("int8:16", "int4:16")
ADAPTERS = ("one", "two")

SWITCH_BAR_MS = 5.0
DECODE_BARS = {16: 1.03}
"""Largest ratio of decoding times by rank."""


def random_factors(
    slots: AdapterSlots, rank: int, factor_type: FactorType, *, seed: int
) -> dict[str, LowRank]:
    """Random factors for every linear of ``slots``; their product is about 1% of a weight.

    Args:
      slots: of the model.
      rank: of every linear.
      factor_type: ``float16``, ``int8`` or ``int4``.
      seed: of the factors.
    """
    rng = np.random.default_rng(seed)
    factors = {}
    for name, (rows, columns) in slots.linears.items():
        down = columns**-0.5 * rng.standard_normal((rank, columns))
        up = 0.01 * rank**-0.5 * rng.standard_normal((rows, rank))
        factors[name] = store_factors(up, down, factor_type)
    return factors


def add_random_adapters(folder: Path, rank: int, factor_type: FactorType) -> None:
    """Put :data:`ADAPTERS` into the artifact."""
    slots, backbone = read_slots(folder), read_manifest(folder).digest
    for seed, name in enumerate(ADAPTERS):
        factors = random_factors(slots, rank, factor_type, seed=seed)
        details = {"text": None, "rank": rank, "factor_type": factor_type, "seed": seed}
        add_adapter(folder, Adapter(name, factors, backbone, details))


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The report of ``eoracc bench --json`` on the artifact."""
    settings = {
        "--threads": options.threads,
        "--prompt-tokens": options.prompt_tokens,
        "--new-tokens": options.new_tokens,
        "--repeats": options.repeats,
    }
    words = [str(word) for setting in settings.items() for word in setting]
    done = subprocess.run(
        [sys.executable, "-m", "eoracc.compiler.cli", "bench", str(folder), "--json", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: eoracc bench {folder}: {done.stdout}{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the copies, run and print; ``arguments`` default to the command line's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("artifacts", nargs="+", type=_artifact, metavar="LABEL=ARTIFACT")
    parser.add_argument(
        "--kind",
        nargs="+",
        type=_kind,
        default=[_kind(kind) for kind in KINDS],
        metavar="TYPE:RANK",
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the reports there")
    options = parser.parse_args(arguments)
    reports: list[dict[str, Any]] = []
    for label, source in options.artifacts:
        for factor_type, rank in options.kind:
            with tempfile.TemporaryDirectory() as work:
                copy = Path(shutil.copytree(source, Path(work) / "artifact"))
                try:
                    add_random_adapters(copy, rank, factor_type)
                except EoraccError as error:
                    raise SystemExit(f"error: {label}: {error}") from None
                report = bench(copy, options)
            about = {"label": label, "factor_type": factor_type, "rank": rank}
            reports.append({**about, **report, "artifact": str(source)})
    _print(reports)
    if options.json is not None:
        options.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


def _artifact(text: str) -> tuple[str, Path]:
    label, _, folder = text.partition("=")
    if not label or not (Path(folder) / "manifest.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} names no artifact: give LABEL=DIR")
    return label, Path(folder)


def _kind(text: str) -> tuple[FactorType, int]:
    factor_type, _, rank = text.partition(":")
    if factor_type not in get_args(FactorType) or not rank.isdecimal() or int(rank) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not TYPE:RANK: give one like int8:16")
    return cast("FactorType", factor_type), int(rank)


def _print(reports: Sequence[dict[str, Any]]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
    console.print(f"{machine_line()}\n", soft_wrap=True)
    table = Table(box=box.MARKDOWN)
    table.add_column("artifact", no_wrap=True)
    table.add_column("factors", no_wrap=True)
    headings = ("none tokens/s", "adapter tokens/s", "time ratio", "bar", "holds")
    for heading in (*headings, "prefill ratio", "switch ms", "holds", "8 rows tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports:
        none, *others = report["adapters"]
        bar = DECODE_BARS.get(report["rank"])
        switch = report["switch"]["adapter_switch_ms"]
        for adapter in others:
            ratio = adapter["decode_time_ratio"]
            prefill = adapter["first_token_ms"]["median"] / none["first_token_ms"]["median"]
            table.add_row(
                f"{report['label']} + {adapter['adapter']}",
                f"{report['factor_type']} rank {report['rank']}",
                f"{none['decode_tokens_per_s']['median']:.0f}",
                f"{adapter['decode_tokens_per_s']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['low']:.3f} … {ratio['high']:.3f})",
                "" if bar is None else f"≤ {bar}",
                "" if bar is None else _holds(ratio["median"] <= bar),
                f"{prefill:.3f}",
                f"{switch['median']:.3f}",
                _holds(switch["median"] < SWITCH_BAR_MS and report["switch"]["outputs_differ"]),
                f"{report['batches'][-1]['tokens_per_s']['median']:.0f}",
            )
    console.print(table)


def _holds(held: bool) -> str:
    return "yes" if held else "NO"


if __name__ == "__main__":
    main()
