"""Options and output functions that the subcommands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click
from typing_extensions import override

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eoracc.runtime import Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = [
    "PATH",
    "backend_option",
    "json_option",
    "make_console",
    "make_table",
    "print_backend",
    "print_json",
    "trust_remote_code_option",
]

PATH = click.Path(path_type=Path)

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON value and nothing else.",
)


trust_remote_code_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the Python code that the model's repository brings. Only for models that you trust.",
)

backend_option = click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt_rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Backend. auto takes the engines of the artifact if this machine can run them, "
    "else ONNX Runtime.",
)


def print_backend(model: Model) -> None:
    """Print on standard error the backend of an artifact that has engines."""
    if model.backend == "onnxruntime" and model.fallback_reason is None:
        return
    click.echo(f"running with {model.backend} on {model.device}", err=True)
    if model.fallback_reason is not None:
        click.echo(f"not with its engines: {model.fallback_reason}", err=True)


def print_json(content: object) -> None:
    """Print the one JSON value of a command."""
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


def make_console() -> Console:
    """The console for tables on standard output."""
    from rich.console import Console

    class _Piped(Console):
        @override
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, which says that a gate has failed.
            raise BrokenPipeError

    return _Piped(highlight=False)


def make_table(title: str) -> Table:
    """An empty table in the style of all commands."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
