"""Compare compensations at equal bytes: EoRA's variants and their competitors.

    python -m benchmarks.compensation
    python -m benchmarks.compensation --bits 2 --only svd eora caldera --samples 16 --windows 8
    python -m benchmarks.compensation --model gemma3 --only eora "outputs weighed" --json FILE

Every variant is a list of passes: GPTQ in groups of 64, and a budget of bits per weight for its
rank (or for ``allocate``), including factors, scales and zero points. All variants are calibrated
on the same windows and scored in float32 on held-out Wikipedia (the calibration's kind of text) and
on C4, with the protocol of ``benchmarks.quality``. ``eoracc compare`` does the work: finished rows
are cached, and an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine_line
from benchmarks.protocol import (
    MODELS,
    OFFSET_TOKENS,
    SAMPLES,
    WINDOW_LENGTH,
    WINDOWS,
    prepare,
)
from eoracc.compiler.compare.result import Comparison
from eoracc.compiler.compare.run import compare
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.progress import ConsoleProgress

GROUP_SIZE = 64

BUDGET_BITS = 0.8
"""Bits per weight besides codes: scales, zero points, and four-bit rank 32 on SmolLM2-135M."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The passes around GPTQ.

    Attributes:
      outputs: options of 'calibrate_outputs'; None omits the pass.
      allocate: options of 'allocate'; None omits the pass. Without widths the variant's own width
        is the only one.
      calibrate: options of 'calibrate'.
      compensation: passes after GPTQ with their options; factors in four bits by default.
    """

    outputs: Mapping[str, Any] | None = None
    allocate: Mapping[str, Any] | None = None
    calibrate: Mapping[str, Any] = field(default_factory=dict)
    compensation: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"eora": {}})

    def passes(self, bits: int) -> list[Any]:
        """The list of passes for model.yaml; ``eoracc compare`` sets the budget.

        Args:
          bits: of GPTQ, unless 'allocate' chooses them.
        """
        found: list[Any] = []
        if self.outputs is not None:
            found.append({"calibrate_outputs": dict(self.outputs)})
        if self.allocate is not None:
            options = {"bits_per_weight": bits, "widths": [2, 3, 4, 8], **self.allocate}
            found.append({"allocate": {**options, "widths": options["widths"] or [bits]}})
        found.append({"calibrate": dict(self.calibrate)})
        found.append({"quantize_gptq": {"bits": bits, "group_size": GROUP_SIZE}})
        for name, chosen in self.compensation.items():
            found.append({name: {"factor_type": "int4", **chosen}})
        return found


_ALLOCATED: Mapping[str, Any] = {"outputs": {}, "allocate": {}}

VARIANTS: dict[str, Variant] = {
    "svd": Variant(compensation={"svd": {}}),
    "activation_scaled": Variant(compensation={"activation_scaled": {}}),
    "lqer": Variant(compensation={"lqer": {}}),
    "eora": Variant(),
    "factors in float16": Variant(compensation={"eora": {"factor_type": "float16"}}),
    "factors in int8": Variant(compensation={"eora": {"factor_type": "int8"}}),
    "tokens as they are": Variant(calibrate={"tokens": "equal"}),
    "tokens by gradients": Variant(outputs={}, calibrate={"tokens": "gradients"}),
    "outputs weighed": Variant(outputs={}),
    "outputs weighed, tokens as they are": Variant(outputs={}, calibrate={"tokens": "equal"}),
    "outputs weighed by covariance": Variant(outputs={"by": "covariance"}),
    "outputs weighed by its inverse": Variant(outputs={"by": "inverse_covariance"}),
    "top 64 directions": Variant(compensation={"eora": {"directions": 64}}),
    "svd, then eora": Variant(compensation={"svd": {"rank": 16}, "eora": {}}),
    "through the original": Variant(calibrate={"through": "original"}),
    "outputs matched": Variant(calibrate={"match": "outputs"}),
    "caldera": Variant(compensation={"caldera": {}}),
    "bits allocated, no rank": Variant(outputs={}, allocate={"ranks": [0]}, compensation={}),
    "rank allocated": Variant(outputs={}, allocate={"widths": []}),
    "both allocated": Variant(**_ALLOCATED),
    "both allocated by relative error": Variant(allocate={"distortion": "relative"}),
    "both allocated per layer": Variant(outputs={}, allocate={"scope": "per_layer"}),
    "both allocated, outputs matched": Variant(**_ALLOCATED, calibrate={"match": "outputs"}),
    "both allocated, outputs matched, caldera": Variant(
        **_ALLOCATED, calibrate={"match": "outputs"}, compensation={"caldera": {}}
    ),
}


def main() -> None:
    """Compare the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument("--checkpoint", type=Path, help="local checkpoint, to skip the download")
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4), default=(2, 3))
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows per text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows there")
    options = parser.parse_args()
    folder, model = prepare(options.model, checkpoint=options.checkpoint)
    found = {}
    for bits in options.bits:
        config = BuildConfig.model_validate(
            {
                "model": str(model),
                "calibration": {
                    "text": "wiki.txt",
                    "samples": options.samples,
                    "sequence_length": WINDOW_LENGTH,
                },
                "passes": VARIANTS["eora"].passes(bits),
                "verify": {
                    "offset_tokens": OFFSET_TOKENS,
                    "windows": options.windows,
                    "window_length": WINDOW_LENGTH,
                },
                "compare": {
                    "methods": {name: VARIANTS[name].passes(bits) for name in options.only},
                    "ood": {
                        "text": "c4.txt",
                        "windows": options.windows,
                        "window_length": WINDOW_LENGTH,
                    },
                },
                "output": "compensation",
            }
        )
        found[bits] = compare(
            config,
            options.only,
            [str(bits + BUDGET_BITS)],
            config_dir=folder,
            progress=ConsoleProgress(Console(stderr=True)),
        )
        _print(bits, found[bits])
    if options.json is not None:
        content = {str(bits): comparison.as_dict() for bits, comparison in found.items()}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _print(bits: int, comparison: Comparison) -> None:
    """The table, one line per variant."""
    original = comparison.original
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(
        f"{machine_line()}; {bits} bits, group {GROUP_SIZE}; "
        f"{comparison.windows} windows a text; original "
        f"{original.perplexity:.2f} and {original.perplexity_ood:.2f}\n",
        soft_wrap=True,
    )
    table = Table(box=box.MARKDOWN)
    table.add_column("variant", no_wrap=True)
    for column in ("rank", "bits", "folder MB", "wiki", "c4", "KL", "KL, c4", "CPU s"):
        table.add_column(column, justify="right")
    for row in comparison.rows:
        if row.figures is None:
            table.add_row(row.method, "", row.skipped)
            continue
        figures = row.figures
        table.add_row(
            row.method,
            "" if row.rank is None else str(row.rank),
            f"{figures.bits_per_weight:.2f}",
            f"{figures.folder_bytes / 1e6:.1f}",
            f"{figures.perplexity:.2f}",
            f"{figures.perplexity_ood:.2f}",
            f"{figures.kl:.4f}",
            f"{figures.kl_ood:.4f}",
            f"{figures.seconds:.0f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
