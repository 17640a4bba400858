"""Rows that an engine decodes together, and where their keys and values lie on the GPU.

Rows of one call are a *group*: they share tensors ``[rows, heads, columns, head]``. Groups last for
as long as the same rows are decoded together; when they change, rows are copied into a new one, on
the GPU. An engine takes one adapter a call: rows of several adapters are as many groups.

- With a cache of layout ``concat`` a call reads all columns and writes them anew, with those of its
  own tokens behind them: two stretches of memory take turns. Rows end together, in the last column.
  One that is shorter begins later, behind zeros that the mask leaves out.
- With a cache ``in_place`` a call writes its tokens between the others. Every row begins in the
  first column, and there are as many columns as the context is long.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from eoracc.runtime.tensorrt.cuda import aligned

if TYPE_CHECKING:
    from eoracc.runtime.tensorrt.network import Network

__all__ = ["CacheMemory", "Group", "Text", "group_of"]

_SMALLEST = 128
"""Columns that a cache of layout ``concat`` has room for; the room doubles when it is used up."""


class Text:
    """One text, and where its keys and values are: columns ``start`` to ``start + length``.

    Attributes:
      group: that holds them; None while there are none.
      index: of its row in the group.
      start: its first column.
      length: its tokens.
    """

    def __init__(self) -> None:
        self.group: Group | None = None
        self.index = 0
        self.start = 0
        self.length = 0


class CacheMemory:
    """Memory for every key and value of some rows, up to some columns.

    Attributes:
      columns: that there is room for.
      memory: itself.
      addresses: of each tensor, in the network's order.
    """

    def __init__(self, network: Network, rows: int, columns: int) -> None:
        self.columns = columns
        sizes = [aligned(rows * one.heads * columns * one.width) for one in network.caches]
        self.memory = network.device.allocate(sum(sizes))
        ends = np.cumsum([0, *sizes])
        self.addresses = [self.memory.address + int(start) for start in ends[:-1]]


class Group(ABC):
    """The cache of some rows.

    Texts know their group and not the other way round: memory of the GPU must not wait for Python
    to look for cycles.

    Attributes:
      rows: how many.
      columns: of its tensors, as the next call reads them.
      current: where they lie.
    """

    def __init__(self, network: Network, rows: int, columns: int, room: int) -> None:
        self.rows = rows
        self.columns = columns
        self._network = network
        self.current = CacheMemory(network, rows, room)
        # What the mask leaves out is multiplied with 0, and NaN times 0 is NaN.
        network.device.clear(self.current.memory.address, self.current.memory.nbytes)

    @abstractmethod
    def start(self, length: int) -> int:
        """The first column of a text of ``length`` tokens."""

    @abstractmethod
    def total(self, longest: int, tokens: int) -> int:
        """Columns that a call of ``tokens`` looks at, the longest text being ``longest`` before."""

    @abstractmethod
    def target(self, tokens: int) -> CacheMemory:
        """Where a call of ``tokens`` writes."""

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Go on with what has been written to :meth:`target`."""

    def take(self, text: Text, index: int) -> None:
        """Copy the keys and values of ``text`` into row ``index``."""
        source = text.group
        if source is None or not text.length:
            return
        places = zip(
            self._network.caches, source.current.addresses, self.current.addresses, strict=True
        )
        for one, old, new in places:
            before = text.index * one.heads * source.columns + text.start
            after = index * one.heads * self.columns + self.start(text.length)
            self._network.device.copy_pieces(
                old + before * one.width,
                source.columns * one.width,
                new + after * one.width,
                self.columns * one.width,
                nbytes=text.length * one.width,
                n=one.heads,
            )


class _ConcatGroup(Group):
    def __init__(self, network: Network, rows: int, longest: int) -> None:
        super().__init__(network, rows, longest, _room_for(network, longest))
        self._spare: CacheMemory | None = None

    @override
    def start(self, length: int) -> int:
        return self.columns - length

    @override
    def total(self, longest: int, tokens: int) -> int:
        return self.columns + tokens

    @override
    def target(self, tokens: int) -> CacheMemory:
        needed = self.columns + tokens
        if self._spare is None or self._spare.columns < needed:
            self._spare = None  # it is freed before there is another one
            self._spare = CacheMemory(self._network, self.rows, _room_for(self._network, needed))
        return self._spare

    @override
    def advance(self, tokens: int) -> None:
        assert self._spare is not None  # noqa: S101 - a call has written to it
        self.current, self._spare = self._spare, self.current
        self.columns += tokens


class _InPlaceGroup(Group):
    def __init__(self, network: Network, rows: int, capacity: int) -> None:
        super().__init__(network, rows, capacity, capacity)

    @override
    def start(self, length: int) -> int:
        return 0

    @override
    def total(self, longest: int, tokens: int) -> int:
        return longest + tokens

    @override
    def target(self, tokens: int) -> CacheMemory:
        return self.current

    @override
    def advance(self, tokens: int) -> None:
        pass


def _room_for(network: Network, columns: int) -> int:
    room = _SMALLEST
    while room < columns:
        room *= 2
    return min(room, max(network.context_length, columns))


def group_of(network: Network, texts: Sequence[Text]) -> Group:
    """The group of exactly these texts, in this order: the one that they are in, or a new one.

    Raises:
      BackendError: there is no memory for a new one; the texts stay where they are.
    """
    first = texts[0].group
    if first is not None and first.rows == len(texts) and _is_in_order(first, texts):
        return first
    longest = max(text.length for text in texts)
    if network.capacity is None:
        group: Group = _ConcatGroup(network, len(texts), longest)
    else:
        group = _InPlaceGroup(network, len(texts), network.capacity)
    for index, text in enumerate(texts):
        group.take(text, index)
    for index, text in enumerate(texts):
        text.group, text.index, text.start = group, index, group.start(text.length)
    return group


def _is_in_order(group: Group, texts: Sequence[Text]) -> bool:
    return all(
        text.group is group and text.index == index and text.start == group.start(text.length)
        for index, text in enumerate(texts)
    )
