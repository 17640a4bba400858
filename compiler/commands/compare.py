"""``eoracc compare``: many ways of compressing one model, side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import PATH, make_console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from eoracc.compiler.compare import Comparison

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["compare"]

_WIDTH = 110
"""Of the table where no terminal sets one."""


@click.command()
@click.argument("model_yaml", type=PATH)
@click.option(
    "--methods",
    metavar="NAMES",
    help="Methods to try, comma-separated: none,svd,eora,erc_svd. Default: compare.methods.",
)
@click.option(
    "--budgets",
    metavar="BUDGETS",
    help="Bits per weight, or the share of 16-bit bytes that is removed: 3.5,4,30%. "
    "Default: compare.budgets.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a setting: calibration.samples=16. May be repeated.",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Also write all rows there.")
@click.option(
    "--plot", "plot_file", type=PATH, metavar="FILE", help="Also draw them: FILE.svg or FILE.png."
)
@click.option("--fresh", is_flag=True, help="Do again what earlier runs have finished.")
def compare(
    model_yaml: Path,
    methods: str | None,
    budgets: str | None,
    overrides: tuple[str, ...],
    json_file: Path | None,
    plot_file: Path | None,
    *,
    fresh: bool,
) -> None:
    """Compress MODEL_YAML's model in many ways and compare what is left of it.

    Each method takes its place in the passes of MODEL_YAML and spends each budget. Rows that are
    finished are kept: the same command goes on where it was interrupted, and another one starts
    from what both have in common.
    """
    # As for a build; see there.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from eoracc.compiler.compare_plan import find_methods
    from eoracc.compiler.compare_plot import check_plot, draw
    from eoracc.compiler.config import load_config, parse_budget

    config = load_config(model_yaml, overrides)
    section = config.compare
    names = _parts(methods, () if section is None else tuple(section.methods))
    spent = [
        parse_budget(one) for one in _parts(budgets, () if section is None else section.budgets)
    ]
    # Before the heavy imports: what is wrong with these needs no waiting for.
    find_methods(config, names)
    for file in (json_file, plot_file):
        _check_folder(file)
    if plot_file is not None:
        check_plot(plot_file)

    from rich.console import Console

    from eoracc.compiler.compare import compare as run_comparison
    from eoracc.compiler.progress import ConsoleProgress

    comparison = run_comparison(
        config,
        names,
        spent,
        config_dir=model_yaml.parent,
        progress=ConsoleProgress(Console(stderr=True)),
        fresh=fresh,
    )
    console = make_console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(_table(comparison))
    for line in _lines(comparison):
        console.print(line, markup=False, soft_wrap=True)
    if json_file is not None:
        content = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False)
        json_file.write_text(content + "\n", encoding="utf-8")
        console.print(f"wrote {json_file}", markup=False, soft_wrap=True)
    if plot_file is not None:
        draw(comparison, plot_file)
        console.print(f"wrote {plot_file}", markup=False, soft_wrap=True)


def _parts(text: str | None, default: tuple[str, ...]) -> list[str]:
    """What stands between the commas of an option, or what model.yaml says."""
    if text is None:
        return list(default)
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_folder(file: Path | None) -> None:
    from eoracc.compiler.errors import ConfigError

    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder: give the name of a file")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}: make it first")


def _table(comparison: Comparison) -> Table:
    from eoracc.compiler.report import format_bytes

    original = comparison.original
    has_ood = original.perplexity_ood is not None
    table = make_table("held-out text; 'elsewhere' is perplexity on compare.ood")
    table.add_column("method", no_wrap=True)
    headings = ["budget", "spent on", "bits", "linears", "perplexity", "KL"]
    for heading in [*headings, *(["elsewhere"] if has_ood else []), "CPU s"]:
        table.add_column(heading, justify="right", no_wrap=True)

    def ood(value: float | None) -> list[str]:
        return [] if not has_ood else ["" if value is None else _perplexity(value)]

    table.add_row(
        "original",
        "",
        "",
        "16.00",
        format_bytes(original.linear_bytes),
        _perplexity(original.perplexity),
        "0.0000",
        *ood(original.perplexity_ood),
        "",
    )
    for row in comparison.rows:
        spent = "" if row.rank is None else f"rank {row.rank}"
        spent = spent if row.ratio is None else f"ratio {row.ratio:.3g}"
        found = row.figures
        if found is None:
            table.add_row(row.method, row.budget, "", "[dim]skipped[/dim]")
            continue
        table.add_row(
            row.method,
            row.budget or "",
            spent,
            f"{found.bits_per_weight:.2f}",
            format_bytes(found.linear_bytes),
            _perplexity(found.perplexity),
            f"{found.kl:.4f}",
            *ood(found.perplexity_ood),
            f"{found.seconds:.1f}",
        )
    return table


def _perplexity(value: float) -> str:
    """With two decimals; of what has lost all sense, its magnitude.

    >>> _perplexity(24.304), _perplexity(3.6e8)
    ('24.30', '3.6e+08')
    """
    return f"{value:.2f}" if value < 10_000 else f"{value:.1e}"


def _lines(comparison: Comparison) -> list[str]:
    """What stands under the table: what was skipped, and how the rows came about."""
    lines = [
        f"skipped: {row.method} at {row.budget}: {row.skipped}"
        if row.budget
        else f"skipped: {row.method}: {row.skipped}"
        for row in comparison.rows
        if row.skipped is not None
    ]
    through = {
        "original": "the original model, once for all rows",
        "compressed": "each row's own compressed prefix",
        "both": "the original model or each row's own compressed prefix, by its 'calibrate'",
    }[comparison.through]
    lines.append(
        f"{comparison.windows} windows of {comparison.window_length} tokens; statistics over "
        f"{comparison.calibration_tokens:,} tokens through {through}"
    )
    return lines
