"""Linears by whose weights bits are counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["counted"]


class _Placed(Protocol):
    @property
    def block(self) -> int | None: ...


_Linear = TypeVar("_Linear", bound=_Placed)


def counted(linears: Iterable[_Linear]) -> list[_Linear]:
    """Those of ``linears`` that bits per weight count: the ones of decoder blocks.

    Head and embeddings have their own widths, and published tables leave them out. Where no linear
    stands in a block, all count.
    """
    linears = list(linears)
    return [linear for linear in linears if linear.block is not None] or linears
