"""``eoracc adapter``: list, remove, export and import the adapters of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eoracc.compiler.commands.adapter_add import add
from eoracc.compiler.commands.common import (
    PATH,
    authenticity_options,
    json_option,
    make_console,
    make_table,
    noting_lost_signature,
    print_json,
    say,
)

if TYPE_CHECKING:
    from eoracc.passes.solvers.factor_types import FactorType
    from eoracc.runtime.adapters.adapter import Adapter

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["adapter", "export", "import_", "list_adapters", "remove"]


@click.group()
def adapter() -> None:
    """Add, list, remove, export and import an artifact's adapters."""


@adapter.command("list")
@click.argument("artifact", type=PATH)
@authenticity_options
@json_option
def list_adapters(
    artifact: Path, *, digest: str | None, public_key: Path | None, as_json: bool
) -> None:
    """Show the adapters of ARTIFACT, each compared with the manifest."""
    from eoracc.compiler.report.lines import format_bytes
    from eoracc.runtime.adapters.files import listed_adapters, read_adapter
    from eoracc.runtime.artifact.authenticity import Authenticity
    from eoracc.runtime.artifact.folder_change import reading
    from eoracc.runtime.artifact.manifest import read_manifest

    with reading(artifact):
        manifest = read_manifest(artifact, Authenticity(digest, public_key))
        names = listed_adapters(manifest)
        described = [_describe(read_adapter(artifact, name)) for name in names]
    if as_json:
        print_json(described)
        return
    if not described:
        say(f"{artifact} has no adapters")
        return
    table = make_table(f"{artifact}: adapters")
    table.add_column("adapter", no_wrap=True)
    for heading in ("rank", "factors", "linears", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("perplexity", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    for entry in described:
        table.add_row(
            entry["name"],
            str(entry["rank"]),
            ", ".join(entry["factor_types"]),
            str(entry["linears"]),
            format_bytes(entry["bytes"]),
            _perplexity(entry),
            str(entry["details"].get("from", "")),
        )
    make_console().print(table)


def _perplexity(described: dict[str, Any]) -> str:
    """Perplexity on its held-out text without and with the adapter; empty if not measured."""
    figures = described["details"].get("perplexity")
    if not isinstance(figures, dict):  # details are free to hold anything
        return ""
    pair = [figures.get(key) for key in ("none", described["name"])]
    is_measured = all(isinstance(figure, int | float) for figure in pair)
    return " to ".join(f"{figure:.2f}" for figure in pair) if is_measured else ""


def _describe(one: Adapter) -> dict[str, Any]:
    return {
        "name": one.name,
        "rank": one.rank,
        "factor_types": list(one.factor_types),
        "linears": len(one.factors),
        "bytes": one.nbytes,
        "backbone": one.backbone,
        "details": dict(one.details),
    }


@adapter.command()
@click.argument("artifact", type=PATH)
@click.argument("name")
@authenticity_options
@json_option
def remove(
    artifact: Path, name: str, *, digest: str | None, public_key: Path | None, as_json: bool
) -> None:
    """Remove the adapter NAME from ARTIFACT."""
    from eoracc.runtime.adapters.files import listed_adapters
    from eoracc.runtime.adapters.store import remove_adapter
    from eoracc.runtime.artifact.authenticity import Authenticity

    with noting_lost_signature(artifact):
        manifest = remove_adapter(artifact, name, Authenticity(digest, public_key))
    left = listed_adapters(manifest)
    if as_json:
        print_json({"removed": name, "adapters": left})
    else:
        say(f"removed {name}; {_listed(left)}")


@adapter.command()
@click.argument("artifact", type=PATH)
@click.argument("name")
@click.option("--to", "folder", type=PATH, required=True, help="Folder to create.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["peft", "onnx"]),
    default="peft",
    show_default=True,
    help="PEFT's folder, or ONNX Runtime's .onnx_adapter with its description.",
)
@authenticity_options
@json_option
def export(
    artifact: Path,
    name: str,
    *,
    folder: Path,
    form: str,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Write the adapter NAME of ARTIFACT for use elsewhere."""
    from eoracc.compiler.adapters.exchange import export_onnx, export_peft
    from eoracc.runtime.artifact.authenticity import Authenticity
    from eoracc.runtime.artifact.folder_change import reading
    from eoracc.runtime.artifact.manifest import read_manifest

    with reading(artifact):
        read_manifest(artifact, Authenticity(digest, public_key))
        files = (export_peft if form == "peft" else export_onnx)(artifact, name, folder)
    if as_json:
        print_json({"files": [str(path) for path in files]})
    else:
        for path in files:
            say(f"wrote {path}")


@adapter.command("import")
@click.argument("artifact", type=PATH)
@click.argument("source", metavar="DIR|FILE", type=PATH)
@click.option("--name", help="Name of the adapter; a file that eoracc exported has one.")
@click.option(
    "--factor-type",
    type=click.Choice(["int8", "int4", "float16"]),
    help="Type to round the factors of a PEFT adapter to; default: the type of the artifact.",
)
@click.option("--force", is_flag=True, help="Replace an existing adapter of this name.")
@authenticity_options
@json_option
def import_(
    artifact: Path,
    source: Path,
    *,
    name: str | None,
    factor_type: FactorType | None,
    force: bool,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Add to ARTIFACT a LoRA that PEFT saved to DIR, or an .onnx_adapter FILE."""
    from eoracc.compiler.adapters.exchange import import_adapter
    from eoracc.runtime.adapters.store import add_adapter
    from eoracc.runtime.artifact.authenticity import Authenticity
    from eoracc.runtime.artifact.folder_change import reading
    from eoracc.runtime.artifact.manifest import read_manifest

    authenticity = Authenticity(digest, public_key)
    with reading(artifact):
        read_manifest(artifact, authenticity)
        imported = import_adapter(artifact, source, name, factor_type)
    with noting_lost_signature(artifact):
        add_adapter(artifact, imported, force=force, authenticity=authenticity)
    if as_json:
        print_json(_describe(imported))
        return
    say(
        f"imported {imported.name}: rank {imported.rank}, {len(imported.factors)} linears, "
        f"{', '.join(imported.factor_types)} factors"
    )
    if rounding := imported.details.get("rounding"):
        say(
            f"rounding changed the product of a linear's factors by {rounding['mean']:.2%} on "
            f"average, at most {rounding['largest']:.2%} ({rounding['linear']})"
        )


adapter.add_command(add)


def _listed(names: list[str]) -> str:
    return f"left: {', '.join(names)}" if names else "none is left"
