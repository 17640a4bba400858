"""Adapters and their places.

ONNX Runtime takes all adapters stacked: switching from one to another is changing an index
(:class:`AdapterBank`). What else keeps adapters, on a GPU for example, gives them places alike.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.errors import RequestError
from eoracc.plugins.adapters import AdapterSlots, pack_adapter, stack_adapters
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.request import AdapterChoice, adapter_weights

__all__ = ["NO_PLACE", "SUMS", "AdapterBank", "AdapterPlaces", "FactorsOf", "Weights"]

NO_PLACE = -1
"""The place of no adapter: the index of a row that is served by the backbone alone."""

SUMS = 8
"""Weighted sums of adapters that are kept while nobody uses them."""

_ALIGNMENT = 64
"""Bytes of a vector, and of a line of the cache."""

Weights: TypeAlias = tuple[tuple[str, float], ...]
"""Names of adapters with the weights that they are summed with."""

FactorsOf: TypeAlias = Callable[[Weights], Mapping[str, LowRank]]
"""Gives the factors of a weighted sum of adapters, by linear."""

_Packed: TypeAlias = Mapping[str, NDArray[np.generic]]
"""Operands of adapters by graph input."""

_PackedT = TypeVar("_PackedT")
"""An adapter, ready to be put at a place."""


class AdapterPlaces(ABC, Generic[_PackedT]):
    """Adapters, each at its place. Threads may share it.

    An adapter keeps its place for as long as the bank lives. A weighted sum of adapters gets one
    when it is first asked for; there it stays after its last request has ended, until too many
    sums are unused: then the one that was used longest ago makes room.

    Attributes:
      names: of the adapters.
      takes_adapters: whether the model has inputs for them.
      option: what to build with for a model that has.
    """

    option: str

    def __init__(self, names: Sequence[str], *, takes_adapters: bool, sums: int = SUMS) -> None:
        """Give every adapter its place; a subclass puts them there.

        Args:
          names: of the adapters.
          takes_adapters: whether the model has inputs for them.
          sums: how many weighted sums that are not in use to keep.
        """
        self.names = tuple(names)
        self.takes_adapters = takes_adapters
        self._sums = sums
        self._lock = threading.Lock()
        self._users: Counter[Weights] = Counter()
        singles = self._singles() if takes_adapters else []
        self._places = {one: place for place, one in enumerate(singles)}

    def _singles(self) -> list[Weights]:
        """Every adapter by itself, in the order of their places."""
        return [((name, 1.0),) for name in self.names]

    @abstractmethod
    def _pack(self, weights: Weights) -> _PackedT:
        """Read what ``weights`` asks for. Called without the lock: it may take its time."""

    @abstractmethod
    def _put(self, place: int, packed: _PackedT) -> None:
        """Put it at a place: the first free one, or one whose adapter nobody uses any more."""

    def check(self, adapter: AdapterChoice) -> Weights:
        """What ``adapter`` asks for.

        Raises:
          RequestError: there is no such adapter.
        """
        weights = adapter_weights(adapter)
        for name, _ in weights:
            if not self.takes_adapters:
                raise RequestError(
                    f"adapter '{name}': the artifact takes no adapters: "
                    f"build it with '{self.option}'"
                )
            if name not in self.names:
                known = ", ".join(self.names) or "none"
                raise RequestError(
                    f"adapter '{name}': the artifact has no such adapter: it has {known}"
                )
        return weights

    def acquire(self, adapter: AdapterChoice) -> int:
        """The place of ``adapter``, which it keeps until :meth:`release`.

        Raises:
          RequestError: there is no such adapter.
          EoraccError: it cannot be read, or the sum does not fit the model.
        """
        weights = self.check(adapter)
        if not weights:
            return NO_PLACE
        packed: _PackedT | None = None
        while True:
            with self._lock:
                place = self._places.get(weights)
                if place is None and packed is not None:
                    place = self._add(weights, packed)
                if place is not None:
                    if place >= len(self.names):
                        # A sum becomes the one used last.
                        self._places[weights] = self._places.pop(weights)
                    self._users[weights] += 1
                    return place
            # Without the lock: others need not wait while files are read.
            packed = self._pack(weights)

    def release(self, adapter: AdapterChoice) -> None:
        """End what :meth:`acquire` began."""
        weights = adapter_weights(adapter)
        with self._lock:
            self._users[weights] -= 1
            if not self._users[weights]:
                del self._users[weights]

    def _add(self, weights: Weights, packed: _PackedT) -> int:
        unused = [one for one in list(self._places)[len(self.names) :] if not self._users[one]]
        oldest = unused[0] if len(unused) >= self._sums else None
        place = len(self._places) if oldest is None else self._places[oldest]
        self._put(place, packed)
        if oldest is not None:
            del self._places[oldest]
        self._places[weights] = place
        return place


class AdapterBank(AdapterPlaces[_Packed]):
    """Adapters as operands of the fused op: stacked, an index picks each row's."""

    option = "onnxruntime.adapter_type: int8"

    def __init__(
        self,
        slots: AdapterSlots | None = None,
        names: Sequence[str] = (),
        load: FactorsOf | None = None,
        *,
        sums: int = SUMS,
    ) -> None:
        """Load all adapters.

        Args:
          slots: of the model; None where it has none.
          names: of the adapters.
          load: gives the factors of a weighted sum of adapters, by linear.
          sums: how many weighted sums that are not in use to keep.

        Raises:
          EoraccError: an adapter is damaged or does not fit.
        """
        super().__init__(names, takes_adapters=slots is not None, sums=sums)
        self._slots = slots
        self._load = load
        self._inputs: tuple[int, dict[str, NDArray[np.generic]]] = (0, {})
        singles = self._singles()
        if slots is not None and load is not None and singles:
            stacked = stack_adapters(slots, [pack_adapter(slots, load(one)) for one in singles])
            self._inputs = (1, _in_one_piece(stacked))

    @property
    def inputs(self) -> tuple[int, dict[str, NDArray[np.generic]]]:
        """A number that changes with the bank, and its arrays by graph input.

        The arrays are never written to: who has them may go on with them.
        """
        return self._inputs

    @override
    def _pack(self, weights: Weights) -> _Packed:
        # What has no slots or no files has no names, and nothing can be asked of it.
        assert self._slots is not None  # noqa: S101
        assert self._load is not None  # noqa: S101
        return pack_adapter(self._slots, self._load(weights))

    @override
    def _put(self, place: int, packed: _Packed) -> None:
        assert self._slots is not None  # noqa: S101 - or there was nothing to pack
        version, arrays = self._inputs
        banks = [
            {name: array[:place] for name, array in arrays.items()},
            packed,
            {name: array[place + 1 :] for name, array in arrays.items()},
        ]
        stacked = stack_adapters(self._slots, [one for one in banks if one is packed or _size(one)])
        self._inputs = (version + 1, _in_one_piece(stacked))


def _in_one_piece(arrays: _Packed) -> dict[str, NDArray[np.generic]]:
    """The same arrays in one piece of memory, in their order, which is that of a run.

    A step reads hundreds of small ones: one after the other they take fewer pages, large ones where
    the system has them, and each begins where a vector may.
    """
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]
    memory = np.empty(sum(sizes) + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    pieces: dict[str, NDArray[np.generic]] = {}
    for (name, array), size in zip(arrays.items(), sizes, strict=True):
        piece = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        piece[...] = array
        pieces[name] = piece
        start += size
    return pieces


def _size(bank: _Packed) -> int:
    """Adapters in a bank; none in one without arrays."""
    return max(map(len, bank.values()), default=0)
