"""Choose the number of last blocks to compress: last-layer error and perplexity for every k.

    python -m benchmarks.last_k --ratio 0.2 --step 5
    python -m benchmarks.last_k --average-bits 2.5

The first command prints the curve from which 'select_last_k' chooses, with the perplexities, which
it does not use. The second command quantizes to 3 bits, and to 2 bits in as many blocks as the
average requires: the last ones, a free set, the first ones, or none; the last variant has 2 bits in
the gate and up projections of all blocks instead (half of the weights of each). The texts are those
of ``benchmarks.quality``; the forward passes run in bfloat16 where the processor has units for it.
No artifact is written. With ``--work`` an interrupted run resumes after its last candidate.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.machine import machine_line
from benchmarks.protocol import load_protocol
from eoracc import __version__
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.fidelity import Variant, score_variants
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.sweep.survey import Survey
from eoracc.compiler.text.windows import Windows
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.erc_svd import ErcSvd
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.progress import Progress
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.survey import Schedule

CALIBRATE = Calibrate(tokens="equal")
"""The statistics of ERC-SVD."""

HALF = ("*.gate_proj", "*.up_proj")
"""Linears with half of the weights of a block of SmolLM2."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with its calibration and evaluation texts."""

    loaded: LoadedModel
    calibration: Windows
    held_out: Mapping[str, Windows]
    progress: Progress
    key: str = "benchmark"
    """Digest of everything that trials depend on; trials of another digest are not reused."""

    def context(self, following: Sequence[LayerPass], folder: Path) -> Survey:
        """The context of a survey before ``following``."""
        return Survey(
            model=self.loaded.model,
            linears=find_linears(self.loaded.model),
            windows=self.calibration,
            following=following,
            checkpoint=self.loaded.folder,
            trust_remote_code=False,
            folder=folder,
            key=self.key,
            progress=self.progress,
        )

    def measure(
        self, name: str, context: Survey, option: str, schedule: Schedule
    ) -> dict[str, float]:
        """Last-layer error and perplexities with the option of each block from ``schedule``.

        The row ``name`` is reused if an earlier run has kept it in the context's folder.
        """
        return context.remember(f"row-{name}", lambda: self._measured(context, option, schedule))

    def _measured(self, context: Survey, option: str, schedule: Schedule) -> dict[str, float]:
        last = max(linear.block for linear in context.linears if linear.block is not None)
        with context.trials(option, probes=[last], resume=()) as trials:
            error = trials.errors(schedule, base=schedule)[last]
            compressed = trials.compressed
        executor = Executor(
            context.model, context.linears, precision=resolve_precision(CALIBRATE.precision)
        )

        def weight_of(linear: Linear) -> NDArray[np.float32]:
            return compressed.get(linear.name, linear).effective_weight()

        scored = {
            name: score_variants(
                executor, {"tried": Variant(executor, weight_of)}, text, progress=self.progress
            )["tried"].perplexity
            for name, text in self.held_out.items()
        }
        return {"error": error, **scored}


def curve(bench: Bench, ratio: float, step: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for every ``k`` of erc_svd's curve."""
    context = bench.context([CALIBRATE, ErcSvd()], folder)
    findings = SelectLastK(ratio=ratio, step=step, all_blocks=True).survey(context)
    blocks = sorted(
        {candidate.block for candidate in context.linears if candidate.block is not None}
    )
    for candidate in findings["curve"][1:]:
        course = {
            block: candidate["ratio"] if block in candidate["blocks"] else 0.0 for block in blocks
        }
        row = bench.measure(f"{candidate['k']}", context, "ratio", course)
        chosen = candidate["k"] == findings["chosen"]["k"]
        yield {
            "ratio": ratio,
            "k": candidate["k"],
            "R_l": candidate["ratio"],
            **row,
            "chosen": chosen,
        }


def lower_bits(bench: Bench, average: float, step: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each choice of the weights that get 2 bits instead of 3."""
    context = bench.context([CALIBRATE, QuantizeGptq(bits=3)], folder)
    survey = SelectLastK(average_bits=average, blocks="free", step=step)
    findings = survey.survey(context)
    # Otherwise every trial would start from the plan of the last survey.
    context = bench.context(context.following, folder)
    last, free = findings["curve"][1]["blocks"], findings["free"][-1]["blocks"]
    for name, blocks in (("last", last), ("free", free), ("first", range(len(last)))):
        row = bench.measure(name, context, "bits", dict.fromkeys(blocks, 2))
        yield {"set": name, "blocks": list(blocks), **row}
    overrides = {pattern: QuantizeOverride(bits=2) for pattern in HALF}
    context = bench.context([CALIBRATE, QuantizeGptq(bits=3, overrides=overrides)], folder)
    yield {"set": "gate and up of all", **bench.measure("gate-up", context, "bits", {})}


def main() -> None:
    """Run and score the trials; print one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ratio", type=float, help="share of the parameters to remove")
    what.add_argument("--average-bits", type=float, help="average bits of codes")
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, help="local checkpoint, to skip the download")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows per text")
    parser.add_argument("--work", type=Path, help="folder that keeps finished trials")
    options = parser.parse_args()
    sys.stderr.write(f"{machine_line()}\n")
    bench = _bench(options)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if options.ratio is not None:
            rows = curve(bench, options.ratio, options.step, work)
        else:
            rows = lower_bits(bench, options.average_bits, options.step, work)
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


def _bench(options: argparse.Namespace) -> Bench:
    protocol = load_protocol(
        "smollm2", checkpoint=options.checkpoint, samples=options.samples, windows=options.windows
    )
    settings = [options.ratio, options.average_bits, options.step, options.samples, options.windows]
    return Bench(
        protocol.loaded,
        protocol.calibration,
        {"wiki": protocol.wiki, "c4": protocol.c4},
        ConsoleProgress(Console(stderr=True)),
        key=json.dumps([__version__, protocol.loaded.digest, settings]),
    )


if __name__ == "__main__":
    main()
