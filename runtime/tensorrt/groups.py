"""Groups: rows that an engine decodes together, with their keys and values on the GPU.

The rows of a group share tensors ``[rows, heads, columns, head]``. A group lasts as long as the
same rows are decoded together; when they change, the GPU copies the rows into a new group. An
engine takes one adapter in each call, so that rows with different adapters are in different groups.

- With a cache of layout ``concat`` a call reads all columns and writes a copy that is longer by its
  own tokens; two blocks of memory alternate. All rows end in the last column. A shorter row starts
  later, after zeros that the mask hides.
- With a cache ``in_place`` a call writes its tokens into the cache. All rows start in the first
  column, and there are as many columns as tokens in the context.
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
"""Initial capacity of a ``concat`` cache in columns; it doubles when it is full."""


class Text:
    """One text, with its keys and values in the columns ``start`` to ``start + length`` of a group.

    Attributes:
      group: of the text; None before its first tokens.
      index: of the row in the group.
      start: first column.
      length: number of tokens.
    """

    def __init__(self) -> None:
        self.group: Group | None = None
        self.index = 0
        self.start = 0
        self.length = 0


class CacheMemory:
    """Memory for all keys and values of some rows.

    Attributes:
      columns: capacity.
      memory: the block of memory.
      addresses: of each tensor, in the order of the network.
    """

    def __init__(self, network: Network, rows: int, columns: int) -> None:
        self.columns = columns
        sizes = [aligned(rows * tensor.heads * columns * tensor.width) for tensor in network.caches]
        self.memory = network.device.allocate(sum(sizes))
        ends = np.cumsum([0, *sizes])
        self.addresses = [self.memory.address + int(start) for start in ends[:-1]]


class Group(ABC):
    """The cache of some rows.

    Texts refer to their group, but not the reverse: freeing memory of the GPU must not wait for
    Python's collection of reference cycles.

    Attributes:
      rows: number of rows.
      columns: of the tensors that the next call reads.
      current: memory of those tensors.
    """

    def __init__(self, network: Network, rows: int, columns: int, room: int) -> None:
        self.rows = rows
        self.columns = columns
        self._network = network
        self.current = CacheMemory(network, rows, room)
        # Masked values are multiplied by 0, and NaN times 0 is NaN.
        network.device.clear(self.current.memory.address, self.current.memory.nbytes)

    @abstractmethod
    def start(self, length: int) -> int:
        """First column of a text of ``length`` tokens."""

    @abstractmethod
    def total(self, longest: int, tokens: int) -> int:
        """Columns that a call of ``tokens`` reads, if the longest text had ``longest`` tokens."""

    @abstractmethod
    def target(self, tokens: int) -> CacheMemory:
        """Memory that a call of ``tokens`` writes to."""

    @abstractmethod
    def advance(self, tokens: int) -> None:
        """Make :meth:`target` the current memory."""

    def take(self, text: Text, index: int) -> None:
        """Copy the keys and values of ``text`` into row ``index``."""
        source = text.group
        if source is None or not text.length:
            return
        places = zip(
            self._network.caches, source.current.addresses, self.current.addresses, strict=True
        )
        for tensor, old, new in places:
            before = text.index * tensor.heads * source.columns + text.start
            after = index * tensor.heads * self.columns + self.start(text.length)
            self._network.device.copy_pieces(
                old + before * tensor.width,
                source.columns * tensor.width,
                new + after * tensor.width,
                self.columns * tensor.width,
                nbytes=text.length * tensor.width,
                n=tensor.heads,
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
            self._spare = None  # freed before the next one is allocated
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
    """The group of exactly these texts in this order: their current group, or a new one.

    Raises:
      BackendError: there is no memory for a new group; the texts have not changed.
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
