"""``eoracc adapter add``: solve an adapter for a finished artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eoracc.compiler.commands.common import (
    PATH,
    json_option,
    make_console,
    noting_lost_signature,
    print_json,
    say,
    trust_options,
    trust_remote_code_option,
)
from eoracc.compiler.commands.observing import log_format_option, observing, trace_option
from eoracc.log_lines import LogFormat

if TYPE_CHECKING:
    from eoracc.compiler.adapters.add import AddedAdapter
    from eoracc.compiler.config.sections import AdapterConfig

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["add"]

_LAYOUTS = click.Choice(["packing", "padding"])


@click.command()
@click.argument("artifact", type=PATH)
@click.option("--name", required=True, help="Name of the adapter.")
@click.option(
    "--data",
    required=True,
    metavar="TEXT",
    help="Text of the task: a file, a .jsonl file, a data set folder or a hub id.",
)
@click.option("--field", help="Field of each record that holds the text.")
@click.option("--messages", help="Field of each record that holds chat messages.")
@click.option("--split", help="Split of a data set.")
@click.option("--rank", type=int, help="Rank of the factors; default: 16.")
@click.option(
    "--factor-type",
    type=click.Choice(["int8", "int4", "float16"]),
    help="Storage type of the factors; default: the type of the artifact.",
)
@click.option("--samples", type=int, help="Windows of text to solve on; default: 64.")
@click.option("--sequence-length", type=int, help="Tokens per window; default: 512.")
@click.option(
    "--seed", type=int, help="Draw windows at random with this seed; default: the first windows."
)
@click.option("--layout", type=_LAYOUTS, help="One document a window: padding.")
@click.option(
    "--held-out",
    metavar="TEXT",
    help="Text to score on; default: the text after the windows of --data.",
)
@click.option(
    "--held-out-offset",
    type=int,
    help="Tokens to skip in the text to score on; random windows come from the skipped part.",
)
@click.option("--windows", type=int, help="Windows of text to score on; default: 8.")
@click.option(
    "--model",
    help="The original weights: a folder, a .gguf file or a hub id; by default where the artifact "
    "was built from.",
)
@trust_remote_code_option
@trust_options
@click.option("--no-parity", is_flag=True, help="Skip the comparison with PyTorch.")
@click.option("--force", is_flag=True, help="Replace an existing adapter of this name.")
@trace_option
@log_format_option
@json_option
def add(
    artifact: Path,
    *,
    name: str,
    model: str | None,
    trust_remote_code: bool,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
    no_parity: bool,
    force: bool,
    trace_file: Path | None,
    log_format: LogFormat,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - see _config
) -> None:
    """Solve an adapter from a task's text on the backbone of ARTIFACT, and store it there.

    No gradients and no labels. The backbone does not change: the adapter gives back what it gets
    wrong on this text.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from eoracc.runtime.adapters.adapter import check_adapter_name
    from eoracc.runtime.adapters.slots import read_slots
    from eoracc.runtime.artifact.authenticity import Authenticity
    from eoracc.runtime.artifact.folder_change import reading
    from eoracc.runtime.artifact.manifest import read_manifest

    check_adapter_name(name)
    authenticity = Authenticity(digest, public_key)
    with reading(artifact):
        slots = read_slots(artifact, read_manifest(artifact, authenticity))
    config = _config(options, slots.type)
    from eoracc.compiler.adapters.add import solve_for_artifact

    try:
        with (
            noting_lost_signature(artifact),
            observing(trace_file, log_format, quiet=as_json) as progress,
        ):
            added = solve_for_artifact(
                artifact,
                name,
                config,
                data_dir=Path(),
                progress=progress,
                model=model,
                trust_remote_code=trust_remote_code,
                trust=trust,
                authenticity=authenticity,
                force=force,
                parity=not no_parity,
            )
    except KeyboardInterrupt:
        say(
            f"{artifact} is as it was: the same command goes on from what has been kept",
            err=True,
        )
        raise
    if as_json:
        print_json(_describe(artifact, added))
    else:
        _show(artifact, added)


def _config(options: dict[str, Any], slot_type: str) -> AdapterConfig:
    """The section of model.yaml that is equivalent to the options.

    Raises:
      ConfigError: an option's value is none.
    """
    from eoracc.compiler.config.load import adapter_config

    given = {key: value for key, value in options.items() if value is not None}
    verify = {
        key: given.pop(option)
        for option, key in (
            ("held_out", "text"),
            ("held_out_offset", "offset_tokens"),
            ("windows", "windows"),
        )
        if option in given
    }
    if "text" in verify:  # records of both texts are alike
        verify |= {key: given[key] for key in ("field", "messages", "split") if key in given}
    if "sequence_length" in given:
        verify["window_length"] = given["sequence_length"]
    given["text"] = given.pop("data")
    given.setdefault("factor_type", slot_type)
    return adapter_config({**given, "verify": verify})


def _describe(artifact: Path, added: AddedAdapter) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "artifact": str(artifact),
        "name": added.adapter.name,
        "backbone": added.adapter.backbone,
        "bytes": added.adapter.nbytes,
        "adapters": asdict(added.report),
        "warnings": [asdict(warning) for warning in added.warnings],
        "wall_s": added.wall_s,
        "cpu_s": added.cpu_s,
    }


def _show(artifact: Path, added: AddedAdapter) -> None:
    from eoracc.compiler.report.lines import adapter_lines, adapter_tables, warning_lines

    console = make_console()
    for table in adapter_tables(added.report):
        console.print(table)
    for line in [*adapter_lines(added.report), *warning_lines(added.warnings)]:
        say(line)
    say(
        f"added {added.adapter.name} to {artifact} in {added.wall_s:.0f} s, "
        f"{added.cpu_s:.0f} s of processor time"
    )
