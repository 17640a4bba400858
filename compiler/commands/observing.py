"""Options of long commands that show what they do: ``--trace`` and ``--log-format``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import PATH, make_console, say
from eoracc.log_lines import LogFormat

if TYPE_CHECKING:
    from eoracc.compiler.observe.trace import Trace
    from eoracc.compiler.progress import SilentProgress

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["log_format_option", "observing", "trace_option"]

trace_option = click.option(
    "--trace",
    "trace_file",
    type=PATH,
    metavar="FILE",
    help="Write a Chrome trace to FILE: phases, stages, passes, sessions, threads and memory. "
    "Perfetto opens it.",
)

log_format_option = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Progress and warnings on standard error: lines for people, or JSON.",
)


@contextmanager
def observing(
    trace_file: Path | None, log_format: LogFormat, *, quiet: bool = False
) -> Iterator[SilentProgress]:
    """Open what the options ask for; the progress of the work inside.

    Args:
      trace_file: for the trace; None writes none.
      log_format: of progress and warnings on standard error.
      quiet: show no progress for people.

    Raises:
      ConfigError: the trace cannot be written.
    """
    from eoracc.compiler.observe.build_log import build_log
    from eoracc.compiler.observe.spans import listening
    from eoracc.compiler.observe.trace import Trace
    from eoracc.compiler.progress import ConsoleProgress, SilentProgress

    with ExitStack() as stack:
        if log_format == "json":
            stack.enter_context(listening(stack.enter_context(build_log(sys.stderr))))
        else:
            stack.enter_context(_text_log())
        if trace_file is not None:
            trace = Trace(trace_file)
            stack.callback(_say_incomplete, trace)  # called last, when all has been written
            stack.enter_context(listening(stack.enter_context(trace)))
        shown = log_format == "text" and not quiet
        yield ConsoleProgress(make_console(err=True)) if shown else SilentProgress()


@contextmanager
def _text_log() -> Iterator[None]:
    """Print the build's warnings, which no phase shows, on standard error."""
    handler = logging.lastResort
    assert handler is not None  # noqa: S101 - nobody has removed it
    logger = logging.getLogger("eoracc.build")
    # It looks up standard error with every line, so a progress bar prints it above itself.
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _say_incomplete(trace: Trace) -> None:
    """Say on standard error what a trace lacks."""
    if trace.problem is not None:
        say(f"warning: {trace.path}: is incomplete: {trace.problem}", err=True)
