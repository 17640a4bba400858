"""Compare factorisations: perplexity at equal parameters.

    python -m benchmarks.factorization
    python -m benchmarks.factorization --model gemma3 --samples 16 --windows 8
    python -m benchmarks.factorization --only "erc_svd{beta: adaptive}" --ratios 0.3 --json FILE

Every variant removes the same share of the parameters of the decoder blocks' linears, is calibrated
on the same windows, and is scored in float32 on held-out Wikipedia (the calibration's kind of text)
and on C4, with the protocol of ``benchmarks.quality``. No artifact is written. Rows in the JSON
file are not measured again.

A variant is ``[last_k+|lastN+][allocated+|energy+][outputs+][unit+]PASS[{OPTIONS}]``:

- ``last_k+`` compresses the last blocks only; 'select_last_k' chooses their number, in steps of a
  sixth of the blocks. ``last20+`` compresses the last 20;
- ``allocated+`` gives each weight a ratio of its own with 'allocate_ratios', by SVD-LLM V2's rule;
  ``energy+`` does so by the least sum of relative errors;
- ``outputs+`` matches the original's outputs (``calibrate: {match: outputs}``);
- ``unit+`` gives every token the same weight (``calibrate: {tokens: unit}``).
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.kept_rows import KeptRows
from benchmarks.machine import machine_line
from benchmarks.protocol import MODELS, load_protocol
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel
from eoracc.compiler.observe.spans import cpu_seconds
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.fidelity import score_variants
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import compress
from eoracc.compiler.text.windows import Windows
from eoracc.passes.progress import Progress

METHODS = (
    "factorize_svd",
    "factorize_activation_scaled",
    "svd_llm",
    "allocated+svd_llm_v2",
    "nsvd",
    "outputs+saes_svd",
    "erc_svd",
    "last_k+svd_llm",
    "last_k+erc_svd",
)
CANDIDATES = 6
"""Steps in which 'select_last_k' goes through the blocks, of which it tries all but the last."""
RATIOS = (0.2, 0.3, 0.4)
SAMPLES = 32
WINDOWS = 16

_VARIANT = re.compile(
    r"(?P<flags>(?:(?:last_k|last\d+|allocated|energy|outputs|unit)\+)*)(?P<name>\w+)(?P<options>\{.*\})?"
)


@dataclass(frozen=True)
class Variant:
    """A pass with its options, and flags for the passes before it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """The variant written as ``text``.

        Raises:
          ValueError: ``text`` is not a variant.

        >>> Variant.parse("last_k+erc_svd{beta: 0.1}")
        Variant(name='erc_svd', options={'beta': 0.1}, flags=('last_k',))
        """
        match = _VARIANT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no variant: give one like last_k+erc_svd{{beta: 0.1}}")
        flags = tuple(flag for flag in match["flags"].split("+") if flag)
        return cls(match["name"], yaml.safe_load(match["options"] or "{}"), flags)

    def passes(self, ratio: float, *, blocks: int) -> list[Any]:
        """The list of passes for model.yaml.

        Args:
          ratio: share of all parameters to remove.
          blocks: decoder blocks of the model, which must be of one size for ``lastN``.
        """
        found: list[Any] = []
        options = {"ratio": ratio, **self.options}
        if "last_k" in self.flags:
            step = max(1, blocks // CANDIDATES)
            found.append({"select_last_k": {"ratio": ratio, "step": step}})
        for last in (int(flag[4:]) for flag in self.flags if flag[4:].isdecimal()):
            options["ratio"] = blocks * ratio / last
            options["overrides"] = {
                f"*.layers.{block}.*": {"skip": True} for block in range(blocks - last)
            }
        if "allocated" in self.flags:
            found.append({"allocate_ratios": {"by": "loss"}})
        if "energy" in self.flags:
            found.append({"allocate_ratios": {"by": "energy"}})
        calibrate = {
            "match": "outputs" if "outputs" in self.flags else "weights",
            "tokens": "unit" if "unit" in self.flags else "equal",
        }
        return [*found, {"calibrate": calibrate}, {self.name: options}]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      variant: name of the variant.
      ratio: target share of the parameters to remove; 0 for the original.
      removed: share that was removed.
      wiki: perplexity on Wikipedia.
      c4: perplexity on C4.
      cpu_s: seconds of processor time that the compression took.
      surveys: findings of the surveys.
    """

    variant: str
    ratio: float
    removed: float
    wiki: float
    c4: float
    cpu_s: float
    surveys: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with its calibration and evaluation texts."""

    loaded: LoadedModel
    calibration: Windows
    wiki: Windows
    c4: Windows
    progress: Progress

    def original(self) -> Row:
        """The uncompressed model."""
        return self._row("original", 0.0, Executor(self.loaded.model), 0.0, [])

    def measure(self, variant: str, ratio: float) -> Row:
        """Compress a copy of the model and score it."""
        config = BuildConfig.model_validate(
            {
                "model": str(self.loaded.folder),
                "calibration": {"text": "wiki.txt"},  # whose windows are given
                "passes": Variant.parse(variant).passes(ratio, blocks=self._blocks()),
                "output": "artifact",
            }
        )
        loaded = replace(self.loaded, model=self.loaded.model.clone())
        begun = cpu_seconds()
        with tempfile.TemporaryDirectory() as work:
            compressed = compress(config, loaded, self.calibration, Path(work), self.progress)
            cpu_s = cpu_seconds() - begun
            # A factorised weight is two matmuls; this view of the graph shows plain weights.
            executor = Executor(compressed.model)
            return self._row(variant, ratio, executor, cpu_s, compressed.surveys)

    def _blocks(self) -> int:
        linears = Executor(self.loaded.model).linears
        return len({linear.block for linear in linears if linear.block is not None})

    def _row(
        self,
        variant: str,
        ratio: float,
        executor: Executor,
        cpu_s: float,
        surveys: list[dict[str, Any]],
    ) -> Row:
        before, after = (_parameters(graph) for graph in (Executor(self.loaded.model), executor))
        return Row(
            variant=variant,
            ratio=ratio,
            removed=1 - after / before,
            wiki=self._perplexity(executor, self.wiki),
            c4=self._perplexity(executor, self.c4),
            cpu_s=cpu_s,
            surveys=surveys,
        )

    def _perplexity(self, executor: Executor, windows: Windows) -> float:
        return score_variants(executor, {}, windows, progress=self.progress)["original"].perplexity


def main() -> None:
    """Compress and score the variants, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--checkpoint", type=Path, help="local checkpoint, to skip the download")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", default=METHODS)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows per text")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the rows there for later runs"
    )
    options = parser.parse_args()
    try:
        for variant in options.only:
            Variant.parse(variant)
    except ValueError as error:
        parser.error(str(error))
    rows = KeptRows(options.json, Row)
    known = {(row.variant, row.ratio) for row in rows}
    wanted = [(v, r) for r in options.ratios for v in options.only if (v, r) not in known]
    if ("original", 0.0) not in known:
        wanted.insert(0, ("original", 0.0))
    if wanted:
        bench = _bench(options.model, options.checkpoint, options.samples, options.windows)
    for variant, ratio in wanted:
        sys.stderr.write(f"{variant} {ratio:.0%}\n")
        rows.add(bench.original() if ratio == 0 else bench.measure(variant, ratio))
    _print(list(rows))


def _bench(name: str, checkpoint: Path | None, samples: int, windows: int) -> Bench:
    protocol = load_protocol(name, checkpoint=checkpoint, samples=samples, windows=windows)
    return Bench(
        protocol.loaded,
        protocol.calibration,
        protocol.wiki,
        protocol.c4,
        ConsoleProgress(Console(stderr=True)),
    )


def _parameters(executor: Executor) -> int:
    """Parameters of the linears in decoder blocks."""
    return sum(
        linear.in_features * linear.out_features
        for linear in executor.linears
        if linear.block is not None
    )


def _print(rows: Sequence[Row]) -> None:
    """The table: one line per variant, one pair of columns per ratio."""
    ratios = sorted({row.ratio for row in rows} - {0.0})
    found = {(row.variant, row.ratio): row for row in rows}
    table = Table(box=box.MARKDOWN)
    table.add_column("variant", no_wrap=True)
    for ratio in ratios:
        table.add_column(f"wiki {ratio:.0%}", justify="right")
        table.add_column(f"C4 {ratio:.0%}", justify="right")
    for variant in dict.fromkeys(row.variant for row in rows):
        cells = []
        for ratio in ratios:
            row = found.get((variant, 0.0 if variant == "original" else ratio))
            cells += ["", ""] if row is None else [f"{row.wiki:.2f}", f"{row.c4:.2f}"]
        table.add_row(variant, *cells)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(f"{machine_line()}\n", soft_wrap=True)
    console.print(table)


if __name__ == "__main__":
    main()
