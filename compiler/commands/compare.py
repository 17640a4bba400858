"""``eoracc compare``: compression methods on one model at equal bytes."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import (
    PATH,
    make_console,
    make_table,
    say,
    trust_remote_code_option,
)
from eoracc.compiler.commands.observing import log_format_option, observing, trace_option
from eoracc.log_lines import LogFormat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from rich.console import Console
    from rich.table import Table

    from eoracc.compiler.compare.result import Comparison

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["compare"]

_NAME = 20
"""Characters of a method's name before it wraps on a narrow terminal."""

_ENDLESS = 100_000
"""Characters; no line is longer."""

_SPARE = ("linears", "folder", "CPU s", "spent on", "budget")
"""Columns that a narrow terminal omits, in this order; ``--json`` has all of them."""


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
    help="Bits per weight, the share of the 16-bit bytes to remove, or the size of the folder: "
    "3.5,30%,90MB. "
    "Default: compare.budgets.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a setting: calibration.samples=16. May be repeated.",
)
@click.option("--json", "json_file", type=PATH, metavar="FILE", help="Also write all rows to FILE.")
@click.option(
    "--plot", "plot_file", type=PATH, metavar="FILE", help="Also draw a plot: FILE.svg or FILE.png."
)
@click.option(
    "--fresh", is_flag=True, help="Compute all rows again, also those that earlier runs finished."
)
@trust_remote_code_option
@trace_option
@log_format_option
def compare(
    model_yaml: Path,
    methods: str | None,
    budgets: str | None,
    overrides: tuple[str, ...],
    json_file: Path | None,
    plot_file: Path | None,
    *,
    fresh: bool,
    trust_remote_code: bool,
    trace_file: Path | None,
    log_format: LogFormat,
) -> None:
    """Compress the model of MODEL_YAML with several methods and compare the results.

    Each method takes its place in the passes of MODEL_YAML and spends each budget. Rows that are
    finished are kept: the same command goes on where it was interrupted, and another one starts
    from what both have in common.
    """
    # As for a build; see there.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from eoracc.compiler.compare.methods import find_methods
    from eoracc.compiler.compare.plot import check_plot, draw
    from eoracc.compiler.config.budget import parse_budget
    from eoracc.compiler.config.load import load_config

    config = load_config(model_yaml, overrides, trust_remote_code=trust_remote_code)
    section = config.compare
    names = _parts(methods, () if section is None else tuple(section.methods))
    spent = [
        parse_budget(budget)
        for budget in _parts(budgets, () if section is None else section.budgets)
    ]
    # Before the heavy imports: what is wrong with these needs no waiting for.
    find_methods(config, names)
    for file in (json_file, plot_file):
        _check_folder(file)
    if plot_file is not None:
        check_plot(plot_file)
        _check_apart(json_file, plot_file)

    from eoracc.compiler.compare.run import compare as run_comparison

    with observing(trace_file, log_format) as progress:
        comparison = run_comparison(
            config, names, spent, config_dir=model_yaml.parent, progress=progress, fresh=fresh
        )
    # Before the table: whoever reads that may close the pipe early.
    if json_file is not None:
        content = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        with _writing(json_file):
            json_file.write_text(content + "\n", encoding="utf-8")
    if plot_file is not None:
        with _writing(plot_file):
            draw(comparison, plot_file)
    console = make_console()
    console.print(_fitting(comparison, console))
    written = [f"wrote {file}" for file in (json_file, plot_file) if file is not None]
    for line in (*_lines(comparison), *written):
        say(line)


def _parts(text: str | None, default: tuple[str, ...]) -> list[str]:
    """The comma-separated items of an option; those of model.yaml if it is not given."""
    if text is None:
        return list(default)
    return [part.strip() for part in text.split(",") if part.strip()]


def _check_folder(file: Path | None) -> None:
    from eoracc.errors import ConfigError

    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder: give the name of a file")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}: make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigError(f"{file}: cannot be written: give another file")


def _check_apart(json_file: Path | None, plot_file: Path) -> None:
    from eoracc.errors import ConfigError

    if json_file is not None and json_file.resolve() == plot_file.resolve():
        raise ConfigError(f"{plot_file}: --json and --plot name the same file: give two")


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Turn an error while ``file`` is written into one sentence; a partial file is removed."""
    from eoracc.errors import ConfigError

    existed = file.exists()
    try:
        yield
    except BaseException as error:
        if not existed:
            with suppress(OSError):
                file.unlink()
        if not isinstance(error, OSError):
            raise
        raise ConfigError(
            f"{file}: cannot be written: {error.strerror}: the rows are kept, so run the same "
            "command again with another file"
        ) from error


def _fitting(comparison: Comparison, console: Console) -> Table:
    """The table, without its least important columns on a narrow terminal.

    ``console`` is made wider where that is not enough: a figure that is cut off is none. Nobody
    looks at the width of a pipe.
    """
    table = _table(comparison)
    if console.is_terminal and _width(table, console) > console.width:
        for count in range(len(_SPARE) + 1):
            table = _table(comparison, without=_SPARE[:count])
            table.columns[0].max_width = _NAME
            if _width(table, console) <= console.width:
                break
    console.width = max(console.width, _width(table, console))
    return table


def _width(table: Table, console: Console) -> int:
    """Characters of the longest line if nothing is cut off."""
    return console.measure(table, options=console.options.update(width=_ENDLESS)).maximum


def _table(comparison: Comparison, without: Collection[str] = ()) -> Table:
    """A table of all rows, without the columns named in ``without``."""
    from rich.text import Text

    from eoracc.compiler.report.lines import format_bytes

    original = comparison.original
    has_ood = original.perplexity_ood is not None
    headings = ["budget", "spent on", "bits", "linears", "folder"]
    headings += ["perplexity", "KL", "elsewhere", "CPU s"]
    absent = {*without, *(() if has_ood else ("elsewhere",))}
    shown = [heading for heading in headings if heading not in absent]
    elsewhere = "; 'elsewhere' is perplexity on compare.ood" if has_ood else ""
    table = make_table(f"held-out text{elsewhere}")
    table.add_column("method", overflow="fold")
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, cells: Mapping[str, str | Text]) -> None:
        table.add_row(name, *(cells.get(heading, "") for heading in shown))

    def ood(value: float | None) -> str:
        return "" if value is None else _perplexity(value)

    add(
        "original",
        {
            "bits": "16.00",
            "linears": format_bytes(original.linear_bytes),
            "perplexity": _perplexity(original.perplexity),
            "KL": "0.0000",
            "elsewhere": ood(original.perplexity_ood),
        },
    )
    for row in comparison.rows:
        figures = row.figures
        if figures is None:
            add(row.method, {"budget": row.budget or "", "bits": Text("skipped", style="dim")})
            continue
        spent = "" if row.rank is None else f"rank {row.rank}"
        spent = spent if row.ratio is None else f"ratio {row.ratio:.3g}"
        add(
            row.method,
            {
                "budget": row.budget or "",
                "spent on": spent,
                "bits": f"{figures.bits_per_weight:.2f}",
                "linears": format_bytes(figures.linear_bytes),
                "folder": format_bytes(figures.folder_bytes),
                "perplexity": _perplexity(figures.perplexity),
                "KL": f"{figures.kl:.4f}",
                "elsewhere": ood(figures.perplexity_ood),
                "CPU s": f"{figures.seconds:.1f}",
            },
        )
    return table


def _perplexity(value: float) -> str:
    """With two decimals; of what has lost all sense, its magnitude.

    >>> _perplexity(24.304), _perplexity(3.6e8)
    ('24.30', '3.6e+08')
    """
    return f"{value:.2f}" if value < 10_000 else f"{value:.1e}"


def _lines(comparison: Comparison) -> list[str]:
    """The lines under the table: skipped methods, and how each row was made."""
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
