"""The bank of a model's adapters, each at a place of its own.

For ONNX Runtime, all adapters are stacked (:class:`AdapterBank`): switching adapters changes an
index. Other backends keep adapters differently, on a GPU for example, but number places alike.
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

from eoracc.errors import ArtifactError, PluginError, RequestError
from eoracc.plugins.adapters import AdapterSlots, pack_adapter, stack_adapters
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.printable import printable, quoted
from eoracc.runtime.request import AdapterChoice, adapter_weights

__all__ = ["NO_PLACE", "SUMS", "AdapterBank", "AdapterPlaces", "FactorsOf", "Weights"]

NO_PLACE = -1
"""Place of rows without an adapter, which run on the backbone alone."""

SUMS = 8
"""Number of unused weighted sums of adapters that are kept."""

_ALIGNMENT = 64
"""Bytes of a cache line and of a vector register."""

Weights: TypeAlias = tuple[tuple[str, float], ...]
"""Names of adapters with their weights in a sum."""

FactorsOf: TypeAlias = Callable[[Weights], Mapping[str, LowRank]]
"""Reads the factors of a weighted sum of adapters, by linear."""

_Packed: TypeAlias = Mapping[str, NDArray[np.generic]]
"""Operands of adapters by graph input."""

_PackedT = TypeVar("_PackedT")
"""An adapter in the form that the backend stores."""


class AdapterPlaces(ABC, Generic[_PackedT]):
    """Adapters, each at its place. Threads may share it.

    An adapter keeps its place for the lifetime of the bank. A weighted sum of adapters gets a place
    with its first request and keeps it after its last one, until there are too many unused sums:
    then the least recently used one is replaced.

    Attributes:
      names: of the adapters.
      takes_adapters: whether the model has inputs for adapters.
      option: of model.yaml that builds a model with such inputs.
    """

    option: str

    def __init__(self, names: Sequence[str], *, takes_adapters: bool, sums: int = SUMS) -> None:
        """Assign a place to every adapter; a subclass stores them.

        Args:
          names: of the adapters.
          takes_adapters: whether the model has inputs for adapters.
          sums: number of unused weighted sums to keep.
        """
        self.names = tuple(names)
        self.takes_adapters = takes_adapters
        self._sums = sums
        self._lock = threading.Lock()
        self._users: Counter[Weights] = Counter()
        singles = self._singles() if takes_adapters else []
        self._places = {weights: place for place, weights in enumerate(singles)}

    def _singles(self) -> list[Weights]:
        """Each adapter alone, in the order of places."""
        return [((name, 1.0),) for name in self.names]

    @abstractmethod
    def _pack(self, weights: Weights) -> _PackedT:
        """Read a weighted sum of adapters. Called without the lock, as it may be slow."""

    @abstractmethod
    def _put(self, place: int, packed: _PackedT) -> None:
        """Store an adapter at a place: the first free one, or one with an unused sum."""

    def check(self, adapter: AdapterChoice) -> Weights:
        """Names and weights of ``adapter``.

        Raises:
          RequestError: an adapter is unknown.
        """
        weights = adapter_weights(adapter)
        for name, _ in weights:
            if not self.takes_adapters:
                raise RequestError(
                    f"adapter {quoted(name)}: the artifact takes no adapters: "
                    f"build it with '{self.option}'"
                )
            if name not in self.names:
                known = printable(", ".join(self.names) or "none")
                raise RequestError(
                    f"adapter {quoted(name)}: the artifact has no such adapter: it has {known}"
                )
        return weights

    def acquire(self, adapter: AdapterChoice) -> int:
        """The place of ``adapter``, reserved until :meth:`release`.

        Raises:
          RequestError: an adapter is unknown, or the sum does not fit the model or float32.
          BackendError: memory is exhausted.
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
                        # The sum becomes the most recently used one.
                        self._places[weights] = self._places.pop(weights)
                    self._users[weights] += 1
                    return place
            # Without the lock: other threads need not wait while files are read.
            packed = self._pack_sum(weights)

    def _pack_sum(self, weights: Weights) -> _PackedT:
        # Adapters alone are loaded with the model: what fails here are the weights of a request.
        try:
            return self._pack(weights)
        except (ArtifactError, PluginError) as error:
            raise RequestError(f"adapters: {error}") from error

    def release(self, adapter: AdapterChoice) -> None:
        """Give up the reservation of :meth:`acquire`."""
        weights = adapter_weights(adapter)
        with self._lock:
            self._users[weights] -= 1
            if not self._users[weights]:
                del self._users[weights]

    def _add(self, weights: Weights, packed: _PackedT) -> int:
        sums = list(self._places)[len(self.names) :]
        unused = [weighted for weighted in sums if not self._users[weighted]]
        oldest = unused[0] if len(unused) >= self._sums else None
        place = len(self._places) if oldest is None else self._places[oldest]
        self._put(place, packed)
        if oldest is not None:
            del self._places[oldest]
        self._places[weights] = place
        return place


class AdapterBank(AdapterPlaces[_Packed]):
    """Adapters as operands of the fused op: stacked, with an index for each row."""

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
          slots: of the model; None if it has none.
          names: of the adapters.
          load: reads the factors of a weighted sum of adapters, by linear.
          sums: number of unused weighted sums to keep.

        Raises:
          EoraccError: an adapter is damaged or does not fit.
        """
        super().__init__(names, takes_adapters=slots is not None, sums=sums)
        self._slots = slots
        self._load = load
        self._inputs: tuple[int, dict[str, NDArray[np.generic]]] = (0, {})
        singles = self._singles()
        if slots is not None and load is not None and singles:
            packed = [pack_adapter(slots, load(weights)) for weights in singles]
            self._inputs = (1, _in_one_piece(stack_adapters(slots, packed)))

    @property
    def inputs(self) -> tuple[int, dict[str, NDArray[np.generic]]]:
        """A version number of the bank, and its arrays by graph input.

        The arrays are never written to, so a caller may keep them.
        """
        return self._inputs

    @override
    def _pack(self, weights: Weights) -> _Packed:
        # Without slots or files there are no names, so that every request fails before.
        assert self._slots is not None  # noqa: S101
        assert self._load is not None  # noqa: S101
        return pack_adapter(self._slots, self._load(weights))

    @override
    def _put(self, place: int, packed: _Packed) -> None:
        assert self._slots is not None  # noqa: S101 - see _pack
        version, arrays = self._inputs
        banks = [
            {name: array[:place] for name, array in arrays.items()},
            packed,
            {name: array[place + 1 :] for name, array in arrays.items()},
        ]
        used = [bank for bank in banks if bank is packed or _size(bank)]
        stacked = stack_adapters(self._slots, used)
        self._inputs = (version + 1, _in_one_piece(stacked))


def _in_one_piece(arrays: _Packed) -> dict[str, NDArray[np.generic]]:
    """Copy arrays into one block of memory, aligned, in their order, which is that of a run.

    A step reads hundreds of small arrays. In one block they take fewer pages, which may be huge
    ones.
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
    """Number of adapters in a bank."""
    return max(map(len, bank.values()), default=0)
