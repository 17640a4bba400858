"""What weighing outputs gives: compensation by gradients and covariances next to EoRA and SVD.

    python -m benchmarks.output_weights
    python -m benchmarks.output_weights --bits 2 --rank 32 --samples 16 --windows 8
    python -m benchmarks.output_weights --only unit+logits --match outputs --json FILE

Every variant quantizes with GPTQ and compensates at the same rank, hence at equal bytes, and is
scored in float32 on held-out Wikipedia (the calibration's kind of text) and on C4, in the protocol
of ``benchmarks.quality``. No artifact is written. What the survey has found is kept and shared by
all variants; what has been measured is kept in the JSON file, and is not measured again.

A variant is ``[gradients+|unit+]COMPENSATION``: how tokens count (``calibrate: {tokens: ..}``), and
``none``, ``svd``, ``eora``, or ``eora`` by outputs that count for what ``calibrate_outputs`` finds:
``logits``, ``labels`` (those of the text), ``covariance``, ``inverse_covariance``.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.kept_rows import KeptRows
from benchmarks.protocol import MODELS, load_protocol
from eoracc.compiler.checkpoint import SweepCheckpoint
from eoracc.compiler.executor import Executor
from eoracc.compiler.fidelity import Scorer, Variant
from eoracc.compiler.frontend import LoadedModel
from eoracc.compiler.linears import Linear, find_linears
from eoracc.compiler.progress import ConsoleProgress, Progress
from eoracc.compiler.report import linear_report
from eoracc.compiler.survey import SurveyContext, calibration_batches
from eoracc.compiler.sweep import run_sweep
from eoracc.compiler.text import Windows
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.calibrate_outputs import CalibrateOutputs
from eoracc.passes.eora import Eora
from eoracc.passes.quantize_gptq import QuantizeGptq
from eoracc.passes.svd import Svd

VARIANTS = (
    "none",
    "svd",
    "eora",
    "covariance",
    "inverse_covariance",
    "labels",
    "logits",
    "gradients+eora",
    "gradients+logits",
    "unit+eora",
    "unit+logits",
)

SAMPLES = 16
WINDOWS = 8

_TOKENS = ("equal", "unit", "gradients")
_SURVEYS = {
    "logits": CalibrateOutputs(),
    "labels": CalibrateOutputs(labels="text"),
    "covariance": CalibrateOutputs(by="covariance"),
    "inverse_covariance": CalibrateOutputs(by="inverse_covariance"),
}


@dataclass(frozen=True)
class Choice:
    """How tokens count, and what compensates."""

    tokens: Any
    compensation: str

    @classmethod
    def parse(cls, text: str) -> Choice:
        """The variant called ``text``; ValueError where there is none of that name."""
        tokens, _, compensation = text.rpartition("+")
        found = cls(tokens or "equal", compensation)
        if found.tokens not in _TOKENS or compensation not in ("none", "svd", "eora", *_SURVEYS):
            raise ValueError(f"{text!r} is no variant: give one like {', '.join(VARIANTS[-3:])}")
        return found

    @property
    def survey(self) -> CalibrateOutputs | None:
        """What must be known before the sweep."""
        found = _SURVEYS.get(self.compensation)
        return _SURVEYS["logits"] if found is None and self.tokens == "gradients" else found


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      variant: its name.
      setting: bits, group size, rank, what is matched, and windows of calibration.
      bits: per weight of the compressed linears, scales and factors included.
      wiki: perplexity on Wikipedia.
      c4: perplexity on C4.
      kl: mean KL(original || compressed) per token on Wikipedia, in nats.
      kl_c4: the same on C4.
    """

    variant: str
    setting: str
    bits: float
    wiki: float
    c4: float
    kl: float
    kl_c4: float


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, its texts, and what all variants share."""

    loaded: LoadedModel
    calibration: Windows
    scorers: Sequence[Scorer]
    bits: Any
    group_size: int
    descent: int
    rank: int
    match: Any
    folder: Path
    progress: Progress

    @property
    def setting(self) -> str:
        """What rows are of."""
        return (
            f"{self.bits}g{self.group_size} descent {self.descent} rank {self.rank}, "
            f"{self.match} matched, "
            f"{len(self.calibration.input_ids)} windows"
        )

    def measure(self, name: str) -> Row:
        """Compress a copy of the model and score it."""
        variant = Choice.parse(name)
        model = self.loaded.model.clone()
        linears = find_linears(model)
        passes: list[LayerPass] = [
            Calibrate(match=self.match, tokens=variant.tokens),
            QuantizeGptq(bits=self.bits, group_size=self.group_size, descent=self.descent),
        ]
        if variant.compensation == "svd":
            passes.append(Svd(rank=self.rank))
        elif variant.compensation != "none":
            weigh = variant.compensation in _SURVEYS
            passes.append(Eora(rank=self.rank, weigh_outputs=weigh))
        if variant.survey is not None:
            key = hashlib.sha256(f"{variant.survey}".encode())
            key.update(self.calibration.input_ids.tobytes())
            context = SurveyContext(
                model=model,
                linears=linears,
                windows=self.calibration,
                following=passes,
                checkpoint=self.loaded.folder,
                trust_remote_code=False,
                folder=self.folder / key.hexdigest()[:12],
                key=key.hexdigest(),
                progress=self.progress,
            )
            variant.survey.survey(context)
        with TemporaryDirectory() as work:
            run_sweep(
                Executor(model, linears, precision=Calibrate().resolved_precision),
                passes,
                calibration_batches(self.calibration),
                comparators={},
                checkpoint=SweepCheckpoint(Path(work), "key"),
                progress=self.progress,
            )
        stored = [linear_report(linear) for linear in linears if linear.compressed is not None]
        scored = Variant(Executor(model, linears), Linear.effective_weight)
        wiki, c4 = (scorer.score(scored) for scorer in self.scorers)
        return Row(
            variant=name,
            setting=self.setting,
            bits=8 * sum(one.bytes for one in stored) / sum(math.prod(one.shape) for one in stored),
            wiki=wiki.perplexity,
            c4=c4.perplexity,
            kl=wiki.kl,
            kl_c4=c4.kl,
        )


def main() -> None:
    """Compress, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--checkpoint", type=Path, help="its folder, where it is at hand already")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=VARIANTS)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--descent", type=int, default=QuantizeGptq().descent, help="of GPTQ")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--match", choices=("weights", "outputs"), default="weights")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows per text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    options = parser.parse_args()
    try:
        for name in options.only:
            Choice.parse(name)
    except ValueError as error:
        parser.error(str(error))
    rows = KeptRows(options.json, Row)
    with TemporaryDirectory() as folder:
        bench = _bench(options, Path(folder))
        known = {row.variant for row in rows if row.setting == bench.setting}
        for name in options.only:
            if name in known:
                continue
            sys.stderr.write(f"{name}\n")
            rows.add(bench.measure(name))
        original = [scorer.original().perplexity for scorer in bench.scorers]
    _print([row for row in rows if row.setting == bench.setting], original)


def _bench(options: argparse.Namespace, surveys: Path) -> Bench:
    protocol = load_protocol(
        options.model,
        checkpoint=options.checkpoint,
        samples=options.samples,
        windows=options.windows,
    )
    loaded = protocol.loaded
    return Bench(
        loaded,
        protocol.calibration,
        [Scorer(Executor(loaded.model), one) for one in (protocol.wiki, protocol.c4)],
        options.bits,
        options.group_size,
        options.descent,
        options.rank,
        options.match,
        surveys,
        ConsoleProgress(Console(stderr=True)),
    )


def _print(rows: Sequence[Row], original: Sequence[float]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{rows[0].setting}; original {original[0]:.2f}, C4 {original[1]:.2f}\n")
    table = Table(box=box.MARKDOWN)
    table.add_column("variant", no_wrap=True)
    for heading in ("bits", "wiki", "C4", "KL", "KL C4"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.variant,
            f"{row.bits:.2f}",
            f"{row.wiki:.2f}",
            f"{row.c4:.2f}",
            f"{row.kl:.4f}",
            f"{row.kl_c4:.4f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
