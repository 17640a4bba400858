"""``eoracc inspect``: show the layers of an artifact or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import (
    PATH,
    authenticity_options,
    json_option,
    make_console,
    make_table,
    print_json,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from eoracc.compiler.report.content import FactorizedReport, LinearReport
    from eoracc.compiler.report.inspection import ArtifactSummary, CheckpointSummary

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["inspect"]

_SIGNATURES = {
    "none": "not signed",
    "unchecked": "with a signature that --public-key checks",
    "valid": "signed by the owner of the key",
}


@click.command()
@click.argument("path", metavar="ARTIFACT|CHECKPOINT", type=PATH)
@authenticity_options
@json_option
def inspect(path: Path, *, digest: str | None, public_key: Path | None, as_json: bool) -> None:
    """Show the layers of an artifact, a checkpoint folder or a GGUF file."""
    from eoracc.compiler.report.inspection import ArtifactSummary, inspect_path
    from eoracc.runtime.artifact.authenticity import Authenticity

    summary = inspect_path(path, Authenticity(digest, public_key))
    if as_json:
        print_json(summary.as_dict())
    elif isinstance(summary, ArtifactSummary):
        _show_artifact(summary)
    else:
        _show_checkpoint(summary)


def _show_artifact(summary: ArtifactSummary) -> None:
    from eoracc.compiler.report.lines import (
        adapter_tables,
        fidelity_table,
        format_bytes,
        report_lines,
    )

    console = make_console()
    if summary.report.factorized:
        console.print(_factorized_table(summary.report.factorized))
    console.print(_linears_table(summary))
    console.print(_folder_table(summary))
    console.print(fidelity_table(summary.report.fidelity.rows))
    for adapters in adapter_tables(summary.report.adapters):
        console.print(adapters)
    lines = [
        *report_lines(summary.report),
        (
            f"compressed linears: {format_bytes(summary.linear_bytes)}, "
            f"{summary.bits_per_weight:.2f} bits per weight"
        ),
        f"artifact: {format_bytes(summary.folder_bytes)} in {len(summary.manifest.files)} files",
        f"manifest.json: sha256 {summary.manifest_sha256}, {_SIGNATURES[summary.signature]}",
    ]
    if not summary.has_parity_record:
        lines.append(
            "parity record: none, so 'eoracc verify' cannot repeat the check: build with "
            "'verify.parity: true' and without --lean to have one"
        )
    for line in lines:
        say(line)


def _linears_table(summary: ArtifactSummary) -> Table:
    from eoracc.compiler.report.lines import format_bytes

    linears = summary.report.linears
    stages = _stages(linears)
    table = make_table(f"{summary.path}: linears, and their output errors after each pass")
    table.add_column("block", justify="right")
    table.add_column("linear", no_wrap=True)
    pruned = any(linear.sparsity is not None for linear in linears)
    for heading in ("shape", *(["zeros"] if pruned else []), "bits", "group", "rank", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="right")
    for linear in linears:
        table.add_row(
            "" if linear.block is None else str(linear.block),
            linear.role,
            "x".join(map(str, linear.shape)),
            *([_share(linear.sparsity)] if pruned else []),
            "" if linear.bits is None else str(linear.bits),
            "" if linear.group_size is None else str(linear.group_size),
            str(linear.rank) if linear.rank else "",
            format_bytes(linear.bytes),
            *_errors(linear, stages),
        )
    return table


def _share(sparsity: float | None) -> str:
    return "" if sparsity is None else f"{sparsity:.1%}"


def _folder_table(summary: ArtifactSummary) -> Table:
    from eoracc.compiler.report.folder import KINDS
    from eoracc.compiler.report.lines import format_bytes

    total = summary.folder_bytes
    table = make_table("what the bytes of the folder are spent on")
    table.add_column("kind", no_wrap=True)
    for heading in ("bytes", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind, size in summary.folder_kinds.items():
        table.add_row(KINDS[kind], format_bytes(size), f"{size / total:.1%}")
    table.add_row("folder", format_bytes(total), "100.0%")
    return table


def _factorized_table(factorized: Sequence[FactorizedReport]) -> Table:
    stages = _stages(factorized)
    table = make_table("weights as products u v, whose factors are linears below")
    table.add_column("block", justify="right")
    table.add_column("weight", no_wrap=True)
    for heading in ("shape", "rank", "removed", *(stage.replace("_", " ") for stage in stages)):
        table.add_column(heading, justify="right", no_wrap=True)
    for weight in factorized:
        table.add_row(
            "" if weight.block is None else str(weight.block),
            weight.role,
            "x".join(map(str, weight.shape)),
            str(weight.rank),
            f"{weight.removed:.1%}",
            *_errors(weight, stages),
        )
    return table


def _stages(reports: Sequence[LinearReport | FactorizedReport]) -> list[str]:
    return list(dict.fromkeys(stage for report in reports for stage in report.errors))


def _errors(report: LinearReport | FactorizedReport, stages: Sequence[str]) -> list[str]:
    return [f"{report.errors[stage]:.4f}" if stage in report.errors else "" for stage in stages]


def _show_checkpoint(summary: CheckpointSummary) -> None:
    from eoracc.compiler.report.lines import format_bytes

    table = make_table(f"{summary.path}: tensors")
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "dtype", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in summary.tensors:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(tensor.name, shape, tensor.dtype, format_bytes(tensor.bytes))
    console = make_console()
    console.print(table)
    say(
        f"{len(summary.tensors)} tensors, {summary.parameters:,} parameters, "
        f"{format_bytes(summary.bytes)}"
    )
