"""Measure the perplexity of compressed models with the protocol used for the peers.

    python -m benchmarks.quality [--model smollm2|gemma3] [--only SETTING ...] [--samples N]
                                 [--windows N] [--peers VENV] [--json FILE]

The text is ``wiki.utf8`` with its document tags removed. The first 64 windows of 512 tokens are for
calibration, 16 windows from token 200,000 for evaluation, each window on its own. ``c4.utf8`` from
character 100,000 is scored in the same way as out-of-domain text. All linears of the decoder blocks
are compressed; embeddings and head are not, unless a recipe says so. Bits are per weight of these
linears, with scales, zero points and factors.

A setting is ``<bits>g<group>`` or ``<bits>row``, followed by optional parts:
``-<compensation><rank>``, with the type of its factors if it is not float16; ``-outputs`` to match
outputs; ``-equal`` for tokens without normalization. Examples: ``3g64``, ``4row-eora32``,
``3g64-eora16-int4-outputs-equal``. A recipe (:data:`benchmarks.recipes.RECIPES`) has a name of its
own: ``mixed-3.6``; ``folder-93`` is a build whose folder takes at most 93.5 MB, so there embedding
and head are compressed too. Each setting is a build of its own through the driver, with a sweep of
its own.

``folder_bytes`` are the bytes of all files of the folder that was built, or of a peer's file. Only
the builds of ``folder`` recipes check parity, so only their folders have its record. They share
their surveys, which the cache folder keeps; the first of them pays for these in processor time.
Rows of peers are quoted from ``measured_perplexity.json``; with ``--peers VENV`` llama.cpp's files
are made anew from the same checkpoint and scored in the same run. VENV is a virtual environment
with llama-cpp-python 0.3.36 and safetensors.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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

from benchmarks.gguf_files import FILES, make_files
from benchmarks.gguf_peers import score_file
from benchmarks.machine import describe_machine, machine_line
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
from benchmarks.recipes import COMPENSATIONS, RECIPES, Recipe, Setting
from eoracc import __version__
from eoracc.compiler.config.load import load_config
from eoracc.compiler.driver import build
from eoracc.compiler.progress import ConsoleProgress
from eoracc.compiler.report.content import FidelityRow
from eoracc.compiler.report.fidelity import Scorer, score_variants
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets.file_bytes import folder_bytes
from eoracc.compiler.text.windows import Windows
from eoracc.runtime.onnxruntime.session import open_session

_COMPARED = ("svd", "lqer", "activation_scaled")
"""Compensations that are solved on EoRA's backbone, at its rank, and scored beside it."""

DEFAULT = ("3g64", "3g64-eora64")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
      recipe: the setting or recipe, of a peer the type of its file; None for a row that is quoted,
        or that was scored beside another one.
      system: name of the system.
      bits_per_weight: of the compressed linears.
      folder_bytes: of the folder, or of a peer's file; None where none was written or measured.
      wiki: perplexity on Wikipedia.
      c4: perplexity on C4; None where it was not measured.
      kl: mean KL(original || compressed) per token on Wikipedia, in nats.
      top1_agreement: share of Wikipedia's tokens on which both models predict the same next token.
      cpu_s: seconds of processor time that the whole build took, without surveys that were kept.
    """

    recipe: str | None
    system: str
    bits_per_weight: float
    folder_bytes: int | None = None
    wiki: float
    c4: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    cpu_s: float | None = None


PEERS: dict[str, tuple[Row, ...]] = {
    "smollm2": tuple(
        Row(
            recipe=None,
            system=row.row,
            bits_per_weight=row.bits_per_weight,
            folder_bytes=row.folder_bytes,
            wiki=row.wiki,
        )
        for series in read_measured().series
        if series.peer
        for row in series.rows
    ),
}
"""Results of other systems on the same model, text and windows; the original has 22.84. Each system
was run once on two processor cores, following its documentation, and is quoted here."""


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
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="VENV",
        help="make and score llama.cpp's files anew with the llama-cpp-python there, "
        "instead of quoting earlier results",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args()
    try:
        settings = {text: RECIPES.get(text) or Setting.parse(text) for text in options.only}
    except ValueError as error:
        parser.error(str(error))
    protocol = load_protocol(options.model, samples=options.samples, windows=options.windows)
    original_c4 = score_variants(
        Executor(protocol.loaded.model),
        {},
        protocol.c4,
        progress=ConsoleProgress(Console(stderr=True)),
    )["original"].perplexity
    context = {
        "model": options.model,
        "samples": options.samples,
        "windows": options.windows,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": {
            "eoracc": __version__,
            **{name: version(name) for name in ("numpy", "onnxruntime", "torch", "transformers")},
        },
    }
    if options.peers is None:
        peers: Sequence[Row] = PEERS.get(options.model, ())
        context["peers_from"] = "quoted from earlier runs, not measured in this one"
    else:
        peers = list(_measured_peers(options.model, protocol, options.peers))
        context["peers_from"] = f"made with {_peer_version(options.peers)} and scored in this run"
    rows: list[Row] = []

    def write() -> None:
        if options.json is not None:
            content = {**context, "rows": [*map(asdict, rows)], "peers": [*map(asdict, peers)]}
            options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    for name, setting in settings.items():
        built = _measure(name, setting, protocol, samples=options.samples, alone=options.alone)
        if not rows:
            rows.append(_row("original", "original, float32", built.original, c4=original_c4))
        rows += built.rows
        write()
    _print(rows, peers, context)
    too_large = [over_limit(row) for row in rows if over_limit(row)]
    if too_large:
        raise SystemExit("\n".join(too_large))


def over_limit(row: Row) -> str:
    """A sentence where the folder of ``row`` is larger than its recipe allows; empty otherwise."""
    recipe = RECIPES.get(row.recipe or "")
    limit = None if recipe is None else recipe.folder_limit_bytes
    if limit is None or row.folder_bytes is None or row.folder_bytes <= limit:
        return ""
    return f"{row.recipe}: the folder takes {row.folder_bytes:,} bytes, more than {limit:,}"


def _measured_peers(model: str, protocol: Protocol, venv: Path) -> Iterator[Row]:
    """Make llama.cpp's files and score their linears, embeddings and heads."""
    progress = ConsoleProgress(Console(stderr=True))
    executor = Executor(protocol.loaded.model.clone())
    scorers = Scorer(executor, protocol.wiki), Scorer(executor, protocol.c4)
    with tempfile.TemporaryDirectory(dir=protocol.folder) as folder:
        made = make_files(
            model, protocol, venv / "bin" / "python", Path(folder), progress, FILES[model]
        )
        for file, path in made:
            sys.stderr.write(f"{file.label}\n")
            row = score_file(path, executor, protocol.loaded.model, scorers)
            yield Row(
                recipe=file.name,
                system=file.label,
                bits_per_weight=row.bits_per_weight,
                folder_bytes=row.file_bytes,
                wiki=row.wiki.perplexity,
                c4=row.c4.perplexity,
                kl=row.wiki.kl,
                top1_agreement=row.wiki.top1_agreement,
            )
            path.unlink()


def _peer_version(venv: Path) -> str:
    """``llama-cpp-python 0.3.36``, as installed in ``venv``."""
    command = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    python = str(venv / "bin" / "python")
    done = subprocess.run([python, "-c", command], check=True, capture_output=True, text=True)
    return f"llama-cpp-python {done.stdout.strip()}"


@dataclass(frozen=True)
class _Built:
    original: FidelityRow
    rows: list[Row]


def _measure(
    name: str, setting: Setting | Recipe, protocol: Protocol, *, samples: int, alone: bool
) -> _Built:
    """Build with ``setting`` and score the artifact."""
    folder, c4 = protocol.folder, protocol.c4
    limited = isinstance(setting, Recipe) and setting.folder_limit_bytes is not None
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
            # The record is part of a folder's bytes; elsewhere the examples check parity.
            "parity": limited,
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
        surveys=folder / "surveys" if limited else None,
    )
    report = result.report
    found = {row.name: row for row in report.fidelity.rows}
    shipped = setting.compensation or "quantized"
    rows = [
        _row(
            name,
            setting.label,
            found[shipped],
            folder_bytes=folder_bytes(result.output),
            c4=_perplexity(result.output, c4),
            cpu_s=report.build.cpu_s,
        )
    ]
    if compares:
        rows += [
            _row(None, "· the same backbone without factors", found["quantized"]),
            *(
                _row(
                    None,
                    f"· the same backbone + {COMPENSATIONS[compared]} rank {setting.rank}",
                    found[compared],
                )
                for compared in _COMPARED
            ),
        ]
    return _Built(found["original"], rows)


def _row(
    recipe: str | None,
    system: str,
    row: FidelityRow,
    *,
    folder_bytes: int | None = None,
    c4: float | None = None,
    cpu_s: float | None = None,
) -> Row:
    return Row(
        recipe=recipe,
        system=system,
        bits_per_weight=row.bits_per_weight,
        folder_bytes=folder_bytes,
        wiki=row.perplexity,
        c4=c4,
        kl=row.kl,
        top1_agreement=row.top1_agreement,
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
        f"{machine_line()}, {versions}\n",
        soft_wrap=True,
    )
    table = Table(box=box.MARKDOWN)
    table.add_column("system", no_wrap=True)
    for heading in ("MB", "bits", "wiki", "c4", "KL", "top-1", "CPU s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (*rows, *peers):
        table.add_row(
            row.system,
            "" if row.folder_bytes is None else f"{row.folder_bytes / 1e6:.1f}",
            f"{row.bits_per_weight:.2f}",
            f"{row.wiki:.2f}",
            _optional(row.c4, ".2f"),
            _optional(row.kl, ".4f"),
            _optional(row.top1_agreement, ".1%"),
            _optional(row.cpu_s, ".0f"),
        )
    console.print(table)
    console.print(
        "MB: of all files of the folder, or of a peer's file; bits: per weight of the linears of "
        f"decoder blocks. Peers: {context['peers_from']}.",
        soft_wrap=True,
    )


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
