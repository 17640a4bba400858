"""What a reader of a file answered: a command line's exit code and text, or a call's error."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Reply", "call", "command"]

_LONGEST = 4100
"""Characters of one sentence, paths included."""

_SENTENCES = 51
"""A model.yaml has a sentence for each mistake."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_INTERNAL = 3


@dataclass(frozen=True)
class Reply:
    """The end of a command or call.

    Attributes:
      exit_code: 0, 1 (a gate) or 2 (refused); any other is a fault.
      text: on standard error.
      trace: of an exception that nobody caught, else empty.
    """

    exit_code: int
    text: str = ""
    trace: str = ""

    @property
    def verdict(self) -> str:
        """``accepted``, ``refused``, ``traceback``, or ``unclear`` for a bad sentence."""
        if self.trace or self.exit_code not in (0, 1, 2):
            return "traceback"
        if self.exit_code == 0:
            return "accepted"
        lines = self.text.splitlines()
        clear = (
            bool(self.text.strip())
            and len(lines) <= _SENTENCES
            and all(len(line) <= _LONGEST for line in lines)
            and not _CONTROL.search(self.text)
        )
        # A failed gate says so on standard output.
        return "refused" if clear or (self.exit_code == 1 and not self.text) else "unclear"


def command(*arguments: object) -> Reply:
    """Run the command line in this process."""
    from click.testing import CliRunner

    from eoracc.compiler.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    text, trace = result.stderr, ""
    if "--json" in arguments and result.exit_code and not text:
        # Errors are JSON then, on standard output.
        text = str(json.loads(result.stdout or "{}").get("error", ""))
    if result.exc_info is not None and not isinstance(result.exception, SystemExit | None):
        trace = "".join(traceback.format_exception(result.exception))
    if result.exit_code == _INTERNAL:
        trace = text
    return Reply(result.exit_code, text, trace)


def call(function: Callable[[], object]) -> Reply:
    """Call a function that may raise an error of eoracc, as the command line would."""
    from eoracc.failure import INTERNAL_ERROR, explain

    try:
        function()
    except BaseException as error:  # noqa: BLE001 - panics of Rust are no Exception
        failure = explain(error)
        internal = failure.exit_code == INTERNAL_ERROR
        trace = "".join(traceback.format_exception(error)) if internal else ""
        return Reply(failure.exit_code, "\n".join(failure.sentences), trace)
    return Reply(0)
