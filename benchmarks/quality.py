"""Measure the perplexity of compressed models with the protocol used for the peers.

    python -m benchmarks.quality [--model smollm2|gemma3] [--only SETTING ...] [--samples N]
                                 [--windows N] [--json FILE]

The text is ``wiki.utf8`` with its document tags removed. The first 64 windows of 512 tokens are for
calibration, 16 windows from token 200,000 for evaluation, each window on its own. ``c4.utf8`` from
character 100,000 is scored in the same way as out-of-domain text. All linears of the decoder blocks
are compressed; embeddings and head are not. Bits include scales, zero points and factors.

A setting is ``<bits>g<group>`` or ``<bits>row``, followed by optional parts:
``-<compensation><rank>``, with the type of its factors if it is not float16; ``-outputs`` to match
outputs; ``-equal`` for tokens without normalization. Examples: ``3g64``, ``4row-eora32``,
``3g64-eora16-int4-outputs-equal``. A recipe (:data:`RECIPES`) has a name of its own:
``mixed-3.6``. Each setting is a build of its own through the driver, with a sweep of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.measured_perplexity import read_measured
from benchmarks.protocol import (
    MODELS,
    OFFSET_TOKENS,
    SAMPLES,
    WINDOW_LENGTH,
    WINDOWS,
    Protocol,
    load_protocol,
)
from eoracc import __version__
from eoracc.compiler.config.load import load_config
from eoracc.compiler.driver import build
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.content import FidelityRow
from eoracc.compiler.report.fidelity import score_variants
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.text.windows import Windows
from eoracc.runtime.onnxruntime.session import open_session

_NAMES = {
    "activation_scaled": "activation-scaled SVD",
    "eora": "EoRA",
    "lqer": "L2QER",
    "svd": "SVD",
}


@dataclass(frozen=True)
class Setting:
    """A compression: ``<bits>g<group>|row[-<compensation><rank>[-<type>]][-outputs][-equal]``."""

    bits: int
    group_size: int
    compensation: str | None = None
    rank: int = 0
    factor_type: str = "float16"
    match: str = "weights"
    tokens: str = "unit"

    @classmethod
    def parse(cls, text: str) -> Setting:
        """The setting with the name ``text``.

        Raises:
          ValueError: no setting has that name.
        """
        match = re.fullmatch(
            r"([2348])(?:g(\d+)|row)(?:-([a-z_]+)(\d+)(?:-(int[48]))?)?(?:-(outputs))?(?:-(equal))?",
            text,
        )
        if match is None or match[3] not in (None, *_NAMES):
            raise ValueError(f"{text!r} is no setting: give one like 3g64 or 4row-eora32")
        bits, group, compensation, rank, factor_type, target, tokens = match.groups()
        return cls(
            int(bits),
            int(group or -1),
            compensation,
            int(rank or 0),
            factor_type or "float16",
            target or "weights",
            tokens or "unit",
        )

    @property
    def label(self) -> str:
        """Name in the table."""
        group = "whole row" if self.group_size == -1 else f"group {self.group_size}"
        added = f" + {_NAMES[self.compensation]} rank {self.rank}" if self.compensation else ""
        if self.factor_type != "float16":
            added += f" {self.factor_type}"
        if self.match == "outputs":
            added += ", outputs matched"
        if self.tokens == "equal":
            added += ", tokens as they are"
        return f"eoracc {self.bits}-bit {group}, GPTQ{added}"

    def passes(self) -> list[Any]:
        """The list of passes for model.yaml."""
        found: list[Any] = [
            {"calibrate": {"match": self.match, "tokens": self.tokens}},
            {"quantize_gptq": {"bits": self.bits, "group_size": self.group_size}},
        ]
        if self.compensation is not None:
            options = {"rank": self.rank, "factor_type": self.factor_type}
            found.append({self.compensation: options})
        return found


@dataclass(frozen=True)
class Recipe:
    """A list of passes, for compressions that the name of a setting cannot express."""

    label: str
    passes_: tuple[dict[str, Any], ...]
    compensation: str | None = None
    rank: int = 0

    def passes(self) -> list[Any]:
        """The list of passes for model.yaml."""
        return list(self.passes_)


_ENDS = (0, 1, 2, 3, 4, 5, 24, 25, 26, 27, 28, 29)
"""Blocks of SmolLM2-135M whose error affects the logits most."""

_GEMMA_ENDS = (0, 1, 2, 15, 16, 17)
"""The same for Gemma-3-270M, by analogy."""

_CALIBRATE = {"calibrate": {"match": "outputs"}}


def _allocated(bits: float, group_size: int) -> Recipe:
    """Bits and rank of every linear under one budget.

    The groups differ from those of 32 in which the checkpoints were quantized: 192 columns divide
    both widths of SmolLM2-135M, 128 all widths of Gemma-3-270M.
    """
    allocate = {
        "bits_per_weight": bits,
        "widths": [2, 3, 4, 8],
        "ranks": [0, 8, 16, 32, 64, 96],
    }
    return Recipe(
        f"eoracc bits and rank allocated, group {group_size}, + EoRA int4",
        (
            {"calibrate_outputs": {}},
            {"allocate": allocate},
            _CALIBRATE,
            {"quantize_gptq": {"group_size": group_size}},
            {"eora": {}},
        ),
        "eora",
    )


RECIPES: dict[str, Recipe] = {
    "mixed-3.6": Recipe(
        "eoracc 3-bit group 64, v 8-bit, k 4-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    "bits": 3,
                    "group_size": 64,
                    "overrides": {"*.v_proj": {"bits": 8}, "*.k_proj": {"bits": 4}},
                }
            },
        ),
    ),
    "mixed-4.25": Recipe(
        "eoracc 4-bit group 192, v 8-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    "bits": 4,
                    "group_size": 192,
                    "overrides": {"*.v_proj": {"bits": 8}},
                }
            },
        ),
    ),
    "mixed-5.5": Recipe(
        "eoracc 4-bit group 192, k, v and 12 blocks' down 8-bit + CALDERA rank 72 int4",
        (
            {"calibrate_outputs": {}},
            _CALIBRATE,
            {
                "quantize_gptq": {
                    "bits": 4,
                    "group_size": 192,
                    "overrides": {
                        "*.[kv]_proj": {"bits": 8},
                        **{f"*.layers.{block}.*.down_proj": {"bits": 8} for block in _ENDS},
                    },
                }
            },
            {
                "caldera": {
                    "rank": 72,
                    "factor_type": "int4",
                    "overrides": {
                        "*.[kv]_proj": {"skip": True},
                        **{f"*.layers.{block}.*.down_proj": {"skip": True} for block in _ENDS},
                    },
                }
            },
        ),
        "caldera",
        72,
    ),
    "gemma3-4.3": Recipe(
        "eoracc 4-bit group 128, v 8-bit",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    "bits": 4,
                    "group_size": 128,
                    "overrides": {"*.v_proj": {"bits": 8}},
                }
            },
        ),
    ),
    "gemma3-5.5": Recipe(
        "eoracc 4-bit group 128, k, v and 6 blocks' down 8-bit + EoRA rank 96 int4",
        (
            _CALIBRATE,
            {
                "quantize_gptq": {
                    "bits": 4,
                    "group_size": 128,
                    "overrides": {
                        "*.[kv]_proj": {"bits": 8},
                        **{f"*.layers.{block}.*.down_proj": {"bits": 8} for block in _GEMMA_ENDS},
                    },
                }
            },
            {
                "eora": {
                    "rank": 96,
                    "factor_type": "int4",
                    "overrides": {
                        "*.[kv]_proj": {"skip": True},
                        **{
                            f"*.layers.{block}.*.down_proj": {"skip": True} for block in _GEMMA_ENDS
                        },
                    },
                }
            },
        ),
        "eora",
        96,
    ),
    "allocated-3.6": _allocated(3.6, 192),
    "allocated-4.25": _allocated(4.25, 192),
    "allocated-5.5": _allocated(5.5, 192),
    "gemma3-allocated-3.55": _allocated(3.55, 128),
    "gemma3-allocated-4.3": _allocated(4.3, 128),
    "gemma3-allocated-5.5": _allocated(5.5, 128),
}
"""Mixtures of widths for a size: 8 bits in a small part with most of the error."""

_COMPARED = ("svd", "lqer", "activation_scaled")
"""Compensations that are solved on EoRA's backbone, at its rank, and scored beside it."""

DEFAULT = ("3g64", "3g64-eora64")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      system: name of the system.
      bits: per weight of the compressed linears.
      perplexity: on Wikipedia.
      c4: perplexity on C4; None where it was not measured.
      kl: mean KL(original || compressed) per token on Wikipedia, in nats.
      top1: share of Wikipedia's tokens on which both models predict the same next token.
      cpu_s: seconds of processor time that the whole build took.
    """

    system: str
    bits: float
    perplexity: float
    c4: float | None = None
    kl: float | None = None
    top1: float | None = None
    cpu_s: float | None = None


PEERS: dict[str, tuple[Row, ...]] = {
    "smollm2": tuple(
        Row(system=row.row, bits=row.bits, perplexity=row.perplexity)
        for series in read_measured().series
        if series.peer
        for row in series.rows
    ),
}
"""Results of other systems on the same model, text and windows; the original has 22.84. Each system
was run once on two processor cores, following its documentation, and is not measured again here."""


def main() -> None:
    """Build and score the settings, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="SETTING",
        default=DEFAULT,
        help=f"default: {' '.join(DEFAULT)}",
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="calibration windows")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="evaluation windows per text")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="skip the compensations that are scored on EoRA's backbone, to save time",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    try:
        settings = [RECIPES.get(text) or Setting.parse(text) for text in options.only]
    except ValueError as error:
        parser.error(str(error))
    protocol = load_protocol(options.model, samples=options.samples, windows=options.windows)
    original_c4 = score_variants(
        Executor(protocol.loaded.model),
        {},
        protocol.c4,
        progress=ConsoleProgress(Console(stderr=True)),
    )["original"].perplexity
    peers = PEERS.get(options.model, ())
    context = {
        "model": options.model,
        "samples": options.samples,
        "windows": options.windows,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "eoracc": __version__,
            **{name: version(name) for name in ("numpy", "onnxruntime", "torch", "transformers")},
        },
    }
    rows: list[Row] = []
    for setting in settings:
        built = _measure(setting, protocol, samples=options.samples, alone=options.alone)
        if not rows:
            rows.append(_row("original, float32", built.original, c4=original_c4))
        rows += built.rows
        if options.json is not None:
            content = {**context, "rows": [*map(asdict, rows)], "peers": [*map(asdict, peers)]}
            options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _print(rows, peers, context)


@dataclass(frozen=True)
class _Built:
    original: FidelityRow
    rows: list[Row]


def _measure(setting: Setting | Recipe, protocol: Protocol, *, samples: int, alone: bool) -> _Built:
    """Build with ``setting`` and score the artifact."""
    folder, c4 = protocol.folder, protocol.c4
    compares = isinstance(setting, Setting) and setting.compensation == "eora" and not alone
    path = folder / "model.yaml"
    content = {
        "model": str(protocol.loaded.folder),
        "calibration": {
            "text": "wiki.txt",
            "samples": samples,
            "sequence_length": WINDOW_LENGTH,
        },
        "passes": setting.passes(),
        "verify": {
            "text": "wiki.txt",
            "offset_tokens": OFFSET_TOKENS,
            "windows": len(c4.input_ids),
            "window_length": WINDOW_LENGTH,
            "compare": list(_COMPARED) if compares else [],
            "parity": False,  # the examples check parity; this benchmark only measures quality
        },
        "output": "artifact",
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    sys.stderr.write(f"{setting.label}\n")
    result = build(
        load_config(path),
        config_dir=folder,
        progress=ConsoleProgress(Console(stderr=True)),
        force=True,
    )
    report = result.report
    found = {row.name: row for row in report.fidelity.rows}
    shipped = setting.compensation or "quantized"
    rows = [
        _row(
            setting.label,
            found[shipped],
            c4=_perplexity(result.output, c4),
            cpu_s=report.build.cpu_s,
        )
    ]
    if compares:
        rows += [
            _row("· the same backbone without factors", found["quantized"]),
            *(
                _row(f"· the same backbone + {_NAMES[name]} rank {setting.rank}", found[name])
                for name in _COMPARED
            ),
        ]
    return _Built(found["original"], rows)


def _row(
    system: str, row: FidelityRow, *, c4: float | None = None, cpu_s: float | None = None
) -> Row:
    return Row(
        system=system,
        bits=row.bits_per_weight,
        perplexity=row.perplexity,
        c4=c4,
        kl=row.kl,
        top1=row.top1_agreement,
        cpu_s=cpu_s,
    )


def _perplexity(artifact: Path, windows: Windows) -> float:
    """Perplexity of the artifact in ONNX Runtime with the native library, window by window."""
    session = open_session(artifact)
    total, count = 0.0, 0
    for ids in windows.input_ids:
        logits, _ = session.run(ids[None])
        total += _negative_log_likelihood(logits[0, :-1], ids[1:])
        count += len(ids) - 1
    return float(np.exp(total / count))


def _negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Sum over tokens of ``log sum exp(logits) - logits[target]``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    at_target = np.take_along_axis(shifted, targets[:, None], axis=1)[:, 0]
    log_totals = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    return float((log_totals - at_target).sum())


def _print(rows: Sequence[Row], peers: Sequence[Row], context: dict[str, Any]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    versions = ", ".join(f"{name} {number}" for name, number in context["versions"].items())
    console.print(
        f"{context['model']}, {context['samples']} calibration and "
        f"{context['windows']} evaluation windows, {context['date']}, "
        f"{context['machine']}, {versions}\n",
        soft_wrap=True,
    )
    table = Table(box=box.MARKDOWN)
    table.add_column("system", no_wrap=True)
    for heading in ("bits", "wiki", "c4", "KL", "top-1", "CPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (*rows, *peers):
        table.add_row(
            row.system,
            f"{row.bits:.2f}",
            f"{row.perplexity:.2f}",
            _optional(row.c4, ".2f"),
            _optional(row.kl, ".4f"),
            _optional(row.top1, ".1%"),
            _optional(row.cpu_s, ".0f"),
        )
    console.print(table)


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
