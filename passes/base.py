"""Pass classes and the registry: a pass is a frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    import onnx_ir as ir

    from eoracc.passes.graph.linears import LinearGroup

__all__ = ["LayerPass", "ModelPass", "Pass", "pass_names", "pass_type", "register"]

_REGISTRY: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound="type[Pass]")


class Pass(ABC):
    """One step of the pipeline. Subclasses are frozen, keyword-only dataclasses.

    The class docstring is the pass's help text (``eoracc passes``); the fields are its model.yaml
    options, validated by pydantic from their annotations.
    """

    name: ClassVar[str]
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


class ModelPass(Pass):
    """A pass that sees the whole graph."""

    @abstractmethod
    def call(self, model: ir.Model) -> None:
        """Change ``model`` in place."""


class LayerPass(Pass):
    """A pass that sees one group of linears that share an input, in execution order.

    Consecutive layer passes run as one sweep: when a group is reached, its activations come from
    the prefix that the same passes have already compressed (see :mod:`eoracc.compiler.sweep.run`).
    A second ``calibrate`` among them begins a sweep of its own.
    """

    def requires(self, group: LinearGroup) -> None:
        """Raise :class:`~eoracc.errors.PassError` where the pass cannot run here."""

    @abstractmethod
    def call(self, group: LinearGroup) -> None:
        """Change the linears of ``group`` in place."""


def register(cls: _P) -> _P:
    """Class decorator: make a pass known to model.yaml under its ``name``."""
    if cls.name in _REGISTRY:
        raise ValueError(f"two passes are named {cls.name!r}")
    _REGISTRY[cls.name] = cls
    return cls


def pass_names() -> tuple[str, ...]:
    """Names of all registered passes, sorted."""
    return tuple(sorted(_REGISTRY))


def pass_type(name: str) -> type[Pass]:
    """The pass registered as ``name``; KeyError where there is none."""
    return _REGISTRY[name]
