"""Every error that eoracc raises on purpose. Each text is one clear sentence.

The sentence names the file, field or node, says what is wrong, and gives the way out::

    EoraccError                exit code 2: bad input
    ├── PluginError            the native library, or an operand of one of its ops
    ├── ArtifactError          an artifact that is missing, damaged, foreign, or in the way
    ├── BackendError           a package, driver or GPU is missing, or refuses the model
    │   └── LogitsError        logits that are not finite
    ├── RequestError           a request that cannot be served as it is
    │   └── PromptTooLongError a prompt that the model has no room for
    ├── BusyError              more requests than may wait
    ├── ApiError               the answer to an HTTP request that is refused
    ├── ConfigError            model.yaml or the command line
    ├── ModelError             a checkpoint that cannot be read or is not supported
    ├── DataError              calibration or evaluation text
    ├── PassError              a pass on a node of the graph
    ├── TargetError            a target that this machine cannot build
    └── GateError              exit code 1: a build that is correct but not good enough
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from eoracc.printable import printable

__all__ = [
    "ApiError",
    "ArtifactError",
    "BackendError",
    "BusyError",
    "ConfigError",
    "DataError",
    "EoraccError",
    "GateError",
    "ModelError",
    "PassError",
    "PluginError",
    "PromptTooLongError",
    "RequestError",
    "TargetError",
    "error_body",
    "reason",
]

_REASON_CHARS = 400
_MESSAGE_CHARS = 500
_PARAM_CHARS = 100

_NO_HEADERS: Mapping[str, str] = {}


class EoraccError(Exception):
    """Base of every error that eoracc raises on purpose; its text is one clear sentence.

    Attributes:
      sentences: what is wrong, one sentence for each mistake.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, *sentences: str) -> None:
        super().__init__(*sentences)
        self.sentences = sentences

    @override
    def __str__(self) -> str:
        return "\n".join(self.sentences)


class PluginError(EoraccError):
    """The native library is missing or an operand does not fit its op."""


class ArtifactError(EoraccError):
    """An artifact folder that is missing, damaged, foreign, or cannot be written."""


class BackendError(EoraccError):
    """This machine lacks the package or driver that runs a model, or that refuses or fails."""


class RequestError(EoraccError):
    """A request that cannot be served: a bad value, no room, an unknown adapter."""


class PromptTooLongError(RequestError):
    """A prompt that the model has no room for."""


class BusyError(EoraccError):
    """An engine that has as many requests waiting as it may, or is closed: try again later."""


class ApiError(EoraccError):
    """A request that is refused or given up.

    Attributes:
      status: HTTP status.
      kind: OpenAI's ``type``, such as ``invalid_request_error``.
      param: the field that is at fault.
      code: what a program tells errors apart by.
      headers: of the response.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The response's body."""
        return error_body(str(self), kind=self.kind, param=self.param, code=self.code)


class ConfigError(EoraccError):
    """model.yaml or the command line asks for something that cannot be."""


class ModelError(EoraccError):
    """A checkpoint that cannot be read, holds bad values, or is not supported."""


class DataError(EoraccError):
    """Calibration or evaluation text that is missing, empty or too short."""


class PassError(EoraccError):
    """A pass that cannot do its work on a node."""

    def __init__(self, node: str, problem: str) -> None:
        super().__init__(f"{node}: {problem}")
        self.node = node


class TargetError(EoraccError):
    """A target that this machine cannot build, or that does not take the model."""


class GateError(EoraccError):
    """The build is complete and well formed but failed parity or a fidelity limit."""

    exit_code: ClassVar[int] = 1


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error as OpenAI's API returns it; a client's own text in it is printable and bounded."""
    shown = None if param is None else printable(param, _PARAM_CHARS)
    content = {"message": printable(message, _MESSAGE_CHARS), "type": kind, "param": shown}
    return {"error": {**content, "code": code}}


def reason(error: BaseException) -> str:
    """The text of an error of another package, on one line without control characters."""
    return printable(re.sub(r"\s+", " ", str(error)).strip(), _REASON_CHARS)
