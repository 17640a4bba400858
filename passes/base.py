"""Pass classes and the registry: a pass is a frozen dataclass whose fields are its options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

if TYPE_CHECKING:
    import onnx_ir as ir

    from eoracc.passes.graph.linears import LinearGroup

__all__ = [
    "LayerPass",
    "ModelPass",
    "Pass",
    "Problem",
    "pass_names",
    "pass_type",
    "passes_of",
    "register",
]

_REGISTRY: dict[str, type[Pass]] = {}
_P = TypeVar("_P", bound="type[Pass]")
_K = TypeVar("_K", bound="Pass")

Problem = tuple[tuple[str, ...], str]
"""The path of the option that is wrong, empty for the pass itself; what is wrong and the remedy."""


class Pass(ABC):
    """One step of the pipeline. Subclasses are frozen, keyword-only dataclasses.

    The class docstring is the help text of the pass (``eoracc passes``). The fields are its
    model.yaml options, which pydantic validates by their annotations. The section ``Options:`` of
    the docstring describes those that the class adds; those of its bases are inherited.
    """

    name: ClassVar[str]

    needs: ClassVar[tuple[type[Pass], ...]] = ()
    """Kinds of passes; one pass of each kind must come before this one."""
    precedes: ClassVar[tuple[type[Pass], ...]] = ()
    """Kinds of passes; no pass of these kinds may come before this one."""
    repeats: ClassVar[bool] = False
    """Whether the pass may occur more than once, with other passes in between."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        """Find what forbids this pass after ``earlier``, the passes before it in model.yaml."""
        again = any(other.name == self.name for other in earlier)
        if again and not (self.repeats and earlier[-1].name != self.name):
            yield (), "occurs twice: keep one"
        for kind in self.needs:
            if not any(isinstance(other, kind) for other in earlier):
                *others, last = (f"'{known.name}'" for known in passes_of(kind))
                wanted = f"{', '.join(others)} or {last}" if others else last
                yield (), f"needs {wanted} before it: put it above"
        for other in earlier:
            if isinstance(other, self.precedes):
                yield (), f"must come before '{other.name}': move it up"


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


def passes_of(kind: type[_K]) -> tuple[type[_K], ...]:
    """All registered passes of one kind, sorted by name.

    Args:
      kind: a base class of passes.
    """
    return tuple(known for _, known in sorted(_REGISTRY.items()) if issubclass(known, kind))
