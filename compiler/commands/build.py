"""``eoracc build``: make an artifact."""

from __future__ import annotations

import os
from pathlib import Path

import click

from eoracc.compiler.commands.common import (
    PATH,
    json_option,
    make_console,
    print_json,
    say,
    trust_remote_code_option,
)
from eoracc.compiler.commands.observing import log_format_option, observing, trace_option
from eoracc.log_lines import LogFormat

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["build"]


@click.command()
@click.argument("model_yaml", type=PATH)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a setting: calibration.samples=16, passes.eora.rank=0. May be repeated.",
)
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option(
    "--keep-graphs",
    type=PATH,
    metavar="DIR",
    help="Write the graph after each stage to DIR, as .onnx files with their weights.",
)
@click.option(
    "--lean",
    is_flag=True,
    help="Leave out the records that only 'eoracc verify' reads; the build still checks parity.",
)
@click.option(
    "--keep-surveys",
    type=PATH,
    metavar="DIR",
    help="Keep what surveys find in DIR; a build with another budget goes on from there.",
)
@trust_remote_code_option
@trace_option
@log_format_option
@json_option
def build(
    model_yaml: Path,
    overrides: tuple[str, ...],
    *,
    force: bool,
    keep_graphs: Path | None,
    lean: bool,
    keep_surveys: Path | None,
    trust_remote_code: bool,
    trace_file: Path | None,
    log_format: LogFormat,
    as_json: bool,
) -> None:
    """Build the artifact that MODEL_YAML describes."""
    # Before NumPy and PyTorch are loaded: their threads spin for milliseconds after each product
    # unless told not to, and a build has many products with other work between them.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from eoracc.compiler.config.load import load_config
    from eoracc.compiler.targets.output_place import check_output

    config = load_config(model_yaml, overrides, trust_remote_code=trust_remote_code)
    config_dir = model_yaml.parent
    # Before the heavy imports: what cannot be written needs no waiting for.
    check_output(config.output_path(config_dir), force=force)

    from eoracc.compiler.driver import build as run_build
    from eoracc.compiler.report.lines import (
        adapter_tables,
        fidelity_table,
        folder_parts,
        format_bytes,
        report_lines,
    )

    with observing(trace_file, log_format, quiet=as_json) as progress:
        result = run_build(
            config,
            config_dir=config_dir,
            progress=progress,
            force=force,
            keep_graphs=keep_graphs,
            lean=lean,
            surveys=keep_surveys,
        )
    manifest, report = result.manifest, result.report
    if as_json:
        print_json(
            {
                "output": str(result.output),
                "digest": manifest.digest,
                "report": report.as_dict(),
            }
        )
        return
    console = make_console()
    console.print(fidelity_table(report.fidelity.rows))
    for table in adapter_tables(report.adapters):
        console.print(table)
    for line in report_lines(report):
        say(line)
    size = sum(report.folder_kinds.values())
    say(f"wrote {result.output}, {format_bytes(size)}: {folder_parts(report.folder_kinds)}")
