"""How a command ends that raised: sentences, an exit code, and the trace for those who ask.

Exit codes: 1 a gate failed, 2 bad input or the machine's fault (a full disk, no memory, no
permission), 3 an internal error, 130 interrupted (SIGINT), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TextIO

from eoracc.errors import EoraccError
from eoracc.printable import escape_controls, printable

__all__ = [
    "DEBUG_VARIABLE",
    "INTERNAL_ERROR",
    "Failure",
    "TerminatedError",
    "debugging",
    "end_process",
    "explain",
    "hide_thread_traces",
    "write_trace",
]

DEBUG_VARIABLE = "EORACC_DEBUG"
"""Environment variable that asks for the Python trace of every error."""

INTERNAL_ERROR = 3
_INTERRUPTED = 130
_TERMINATED = 143

_SENTENCES = 50
_SENTENCE_CHARS = 4_000
_MESSAGE_CHARS = 400
"""Characters of the message of an error that is not ours."""

_NULL_IN_PATH = "embedded null byte"
"""What Python says of a path that no system call takes."""

_HINT = f"set {DEBUG_VARIABLE}=1 to see the trace, and report it"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has arrived: what cleans up after an interrupt cleans up after this too."""


@dataclass(frozen=True)
class Failure:
    """The end of a command.

    Attributes:
      sentences: each is one line without control characters.
      exit_code: of the process.
    """

    sentences: tuple[str, ...]
    exit_code: int


def debugging() -> bool:
    """Whether ``EORACC_DEBUG`` asks for traces; "" and "0" do not."""
    return os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}


def explain(error: BaseException) -> Failure:
    """The sentences and the exit code for any exception."""
    if isinstance(error, EoraccError):
        sentences = [printable(said, _SENTENCE_CHARS) for said in error.sentences[:_SENTENCES]]
        if more := len(error.sentences) - len(sentences):
            sentences.append(f"and {more:,} more mistakes")
        return Failure(tuple(sentences), error.exit_code)
    if isinstance(error, TerminatedError):
        return Failure(("terminated",), _TERMINATED)
    if isinstance(error, KeyboardInterrupt):
        return Failure(("interrupted",), _INTERRUPTED)
    if (said := _of_the_machine(error)) is not None:
        return Failure((said,), EoraccError.exit_code)
    return Failure((f"internal error: {_named(error)}; {_HINT}",), INTERNAL_ERROR)


def write_trace(error: BaseException, stream: TextIO | None = None) -> None:
    """Write the trace of ``error`` to standard error, or to ``stream``."""
    target = sys.stderr if stream is None else stream
    for block in traceback.format_exception(error):
        target.write(escape_controls(block, keep="\n"))


def end_process(error: BaseException, *, prefix: str = "error: ") -> int:
    """Write the sentences of ``error`` to standard error, after its trace if that is asked for.

    Args:
      error: what ends the process.
      prefix: before each sentence.

    Returns:
      The exit code.
    """
    failure = explain(error)
    if debugging():
        write_trace(error)
    for sentence in failure.sentences:
        sys.stderr.write(f"{prefix}{sentence}\n")
    return failure.exit_code


def hide_thread_traces() -> None:
    """Let an exception that ends a thread print one sentence instead of its trace."""

    def say(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
            end_process(ended.exc_value, prefix="error: in a thread: ")

    threading.excepthook = say


def _of_the_machine(error: BaseException) -> str | None:
    """The sentence for what the operating system refuses; None for any other error."""
    if isinstance(error, MemoryError):
        said = f" ({printable(error, _MESSAGE_CHARS)})" if str(error) else ""
        return f"this machine has not enough memory{said}: free some or use another one"
    if isinstance(error, OSError) and error.strerror:
        named = error.filename is not None
        where = printable(_path(error.filename)) if named else "input or output fails"
        return f"{where}: {printable(error.strerror, _MESSAGE_CHARS)}"
    if type(error) is ValueError and str(error) == _NULL_IN_PATH:
        return "a path holds a null character: write it without"
    return None


def _path(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, str | bytes) else str(filename)


def _named(error: BaseException) -> str:
    kind = type(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    try:
        message = printable(" ".join(str(error).split()), _MESSAGE_CHARS)
    except Exception:  # noqa: BLE001 - the text of an error is foreign code, too
        message = "its text cannot be read"
    name = f"{module}{kind.__qualname__}"
    return f"{name}: {message}" if message else name
