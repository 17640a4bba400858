"""Errors of the compiler. Each text names the file, field or node, what is wrong, the way out."""

from __future__ import annotations

from typing import ClassVar

from eoracc import EoraccError

__all__ = [
    "ConfigError",
    "DataError",
    "EoraccError",
    "GateError",
    "ModelError",
    "PassError",
    "TargetError",
]


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
