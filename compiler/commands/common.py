"""Options and output functions that the subcommands share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from typing_extensions import override

from eoracc.printable import escape_commands, escape_controls, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

    from eoracc.runtime import Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = [
    "PATH",
    "authenticity_options",
    "backend_lines",
    "backend_option",
    "json_option",
    "make_console",
    "make_table",
    "noting_lost_signature",
    "print_backend",
    "print_json",
    "print_text",
    "say",
    "trust_options",
    "trust_remote_code_option",
]

_TITLE_CHARS = 4_000

PATH = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., Any])

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


def say(text: str, *, err: bool = False) -> None:
    """Print one line; characters that could act on the terminal appear as escapes.

    Args:
      text: the line, with names and values of any origin.
      err: print on standard error.
    """
    click.echo(escape_controls(text), err=err)


def print_text(text: str) -> None:
    """Print a piece of a model's text; on a terminal, what could act on it appears as escapes."""
    # With colour, so that click does not take escape sequences out of what goes into a pipe.
    click.echo(escape_commands(text) if sys.stdout.isatty() else text, nl=False, color=True)


def authenticity_options(command: Command) -> Command:
    """Add the options that say which artifact is meant: ``digest`` and ``public_key``."""
    digest = click.option(
        "--digest",
        metavar="SHA256",
        help="Refuse ARTIFACT unless its manifest.json has this sha256, which 'eoracc inspect' "
        "prints.",
    )
    public_key = click.option(
        "--public-key",
        type=PATH,
        metavar="FILE",
        help="Refuse ARTIFACT unless the owner of this ed25519 key (PEM) has signed it.",
    )
    return digest(public_key(command))


def trust_options(command: Command) -> Command:
    """Add ``trust`` and the options of :func:`authenticity_options`."""
    trust = click.option(
        "--trust",
        is_flag=True,
        help="Execute code that ARTIFACT brings: its engines, and its native library where that "
        "is not the installed one.",
    )
    return trust(authenticity_options(command))


@contextmanager
def noting_lost_signature(artifact: Path) -> Iterator[None]:
    """Say on standard error that a change inside removed the signature of ``artifact``."""
    from eoracc.runtime.artifact.signature import SIGNATURE_FILE

    path = artifact / SIGNATURE_FILE
    was_signed = path.exists()
    yield
    if was_signed and not path.exists():
        say(
            f"{artifact}: has changed, so its signature was removed: sign it again with "
            "'eoracc sign'",
            err=True,
        )


def print_backend(model: Model) -> None:
    """Print :func:`backend_lines` on standard error."""
    for line in backend_lines(model):
        say(line, err=True)


def backend_lines(model: Model) -> Iterator[str]:
    """The backend of an artifact that has engines and what runs it, and another native library."""
    if model.library_note is not None:
        yield f"note: {model.library_note}"
    if model.backend == "onnxruntime" and model.fallback_reason is None:
        return
    yield f"running with {model.backend} on {model.device}"
    if model.fallback_reason is not None:
        yield f"not with its engines: {model.fallback_reason}"


def print_json(content: object) -> None:
    """Print the one JSON value of a command, in characters that print on any terminal."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if not text.isascii():
        text = "".join(map(_json_character, text))
    click.echo(text.replace("\x7f", "\\u007f"))


def _json_character(character: str) -> str:
    prints = character.isprintable() or character == "\n"
    return character if prints else json.dumps(character)[1:-1]


def make_console(*, err: bool = False) -> Console:
    """The console for tables and progress.

    Names and values of any origin go into both: markup in them is not followed, and characters that
    could act on the terminal appear as escapes.

    Args:
      err: write to standard error.
    """
    from rich.console import Console
    from rich.segment import Segment

    class _Console(Console):
        @override
        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control is None:
                    text = escape_controls(segment.text, keep="\n")
                    yield Segment(text, segment.style)
                else:
                    yield segment

        @override
        def render_str(self, text: str, **options: Any) -> Text:
            # Rich drops some controls here; widths are right only where the rest is escaped too.
            return super().render_str(escape_controls(text, keep="\n"), **options)

        @override
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, which says that a gate has failed.
            raise BrokenPipeError

    return _Console(stderr=err, highlight=False, markup=False, emoji=False)


def make_table(title: str) -> Table:
    """An empty table in the style of all commands."""
    from rich import box
    from rich.table import Table

    title = printable(title, _TITLE_CHARS)
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
