"""The command line: ``eoracc build | compare | run | verify | inspect | passes | schema``.

Exit codes: 0 all is well, 1 a gate failed, 2 bad input, 3 an internal error, 130 interrupted, 143
terminated. No exception leaves a command: each becomes one sentence, and its trace is shown with
``--debug`` or ``EORACC_DEBUG=1``. With ``--json`` standard output holds one JSON value and nothing
else, errors included (``compare`` writes it to a file). A command is a module of ``commands``, and
imports what it needs when it runs: ``eoracc --help`` answers at once.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import click
from typing_extensions import override

from eoracc import __version__
from eoracc.compiler.commands.adapter import adapter
from eoracc.compiler.commands.bench import bench
from eoracc.compiler.commands.build import build
from eoracc.compiler.commands.compare import compare
from eoracc.compiler.commands.engine import engine
from eoracc.compiler.commands.inspect import inspect
from eoracc.compiler.commands.passes import passes
from eoracc.compiler.commands.run import run
from eoracc.compiler.commands.schema import schema
from eoracc.compiler.commands.serve import serve
from eoracc.compiler.commands.sign import sign
from eoracc.compiler.commands.verify import verify
from eoracc.failure import (
    DEBUG_VARIABLE,
    TerminatedError,
    debugging,
    explain,
    hide_thread_traces,
    write_trace,
)
from eoracc.printable import printable
from eoracc.runtime.artifact.folder_lock import WAIT_S, waiting_at_most

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

__all__ = ["main"]

_JSON = "eoracc.json"
_RESUMABLE = ("build", "compare")
_RESUME = ": run the same command again to go on from what has been kept"
_JSON_TO_FILE = ("compare",)
_BROKEN_PIPE = 141
_USAGE_CHARS = 2_000


class _Main(click.Group):
    """Turn every exception into sentences and an exit code."""

    @override
    def main(self, *args: Any, **extra: Any) -> Any:
        if not args and extra.get("args") is None:
            _own_process()
        return super().main(*args, **extra)

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # Known before options are parsed: a mistake in them is an error like any other.
        options = args[: args.index("--")] if "--" in args else args
        command = next((word for word in options if word in self.commands), None)
        ctx.meta[_JSON] = "--json" in options and command not in _JSON_TO_FILE
        if "--debug" in options:
            # Processes that a command starts inherit it.
            os.environ[DEBUG_VARIABLE] = "1"
        try:
            return super().parse_args(ctx, args)
        except click.ClickException as error:
            _end_wrong_usage(ctx, error)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, SystemExit):
            raise
        except click.ClickException as error:
            _end_wrong_usage(ctx, error)
        except BrokenPipeError:
            _drop_output()
            ctx.exit(_BROKEN_PIPE)
        except BaseException as error:  # noqa: BLE001 - panics of Rust libraries are no Exception
            _end(ctx, error)


def _end_wrong_usage(ctx: click.Context, error: click.ClickException) -> NoReturn:
    if not ctx.meta[_JSON]:
        raise error
    _complain(ctx, [printable(error.format_message(), _USAGE_CHARS)])
    ctx.exit(error.exit_code)


def _end(ctx: click.Context, error: BaseException) -> NoReturn:
    failure = explain(error)
    sentences = list(failure.sentences)
    if isinstance(error, KeyboardInterrupt) and ctx.invoked_subcommand in _RESUMABLE:
        sentences[-1] += _RESUME
    try:
        if debugging():
            write_trace(error)
        _complain(ctx, sentences)
    except OSError:
        pass  # standard error is full or closed: the exit code is all that is left to say
    if isinstance(error, OSError):
        _drop_unwritable_output()
    ctx.exit(failure.exit_code)


def _complain(ctx: click.Context, sentences: Sequence[str]) -> None:
    if ctx.meta[_JSON]:
        click.echo(json.dumps({"error": "\n".join(sentences)}, ensure_ascii=False))
        return
    for sentence in sentences:
        click.echo(f"error: {sentence}", err=True)


def _drop_output() -> None:
    """Keep Python from complaining again when it flushes standard output at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_unwritable_output() -> None:
    # It is None where the process was started without one.
    if sys.__stdout__ is None:
        return
    try:
        sys.__stdout__.flush()
    except OSError:
        _drop_output()


def _own_process() -> None:
    """Prepare a process that is the command alone; tests call commands in theirs."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may lack the characters of a name.
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    # Waits and repairs; every other line is of a library.
    logging.getLogger("eoracc.artifact").addHandler(logging.StreamHandler())
    if debugging():
        return
    hide_thread_traces()
    # Remarks of libraries to their developers, unless they are asked for with -W.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())


def _terminate(number: int, _frame: FrameType | None) -> None:
    # A second signal ends a cleanup that hangs.
    signal.signal(number, signal.SIG_DFL)
    raise TerminatedError


def _debug_option() -> click.Option:
    """``--debug``, which every command has; :meth:`_Main.parse_args` reads it before all others."""
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        help=f"Print the Python trace of an error too, as {DEBUG_VARIABLE}=1 does.",
    )


def _add_debug_option(command: click.Command) -> None:
    command.params.append(_debug_option())
    if isinstance(command, click.Group):
        for child in command.commands.values():
            _add_debug_option(child)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eoracc")
@click.option(
    "--wait",
    "wait_s",
    type=click.IntRange(min=0),
    metavar="SECONDS",
    default=int(WAIT_S),
    show_default=True,
    help="Wait at most this long for an artifact that another process reads or changes.",
)
@click.pass_context
def main(ctx: click.Context, wait_s: int) -> None:
    """Compress language models and compensate the loss with low-rank factors."""
    ctx.with_resource(waiting_at_most(wait_s))


for _command in (
    build,
    compare,
    run,
    verify,
    inspect,
    passes,
    schema,
    bench,
    serve,
    adapter,
    engine,
    sign,
):
    main.add_command(_command)
_add_debug_option(main)


if __name__ == "__main__":
    main(prog_name="eoracc")
