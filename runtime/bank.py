"""All adapters of an artifact, stacked: switching from one to another is changing an index."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.adapters import AdapterSlots, pack_adapter, stack_adapters
from eoracc.plugins.operands import LowRank
from eoracc.runtime.errors import RequestError
from eoracc.runtime.request import AdapterChoice, adapter_weights

__all__ = ["NO_PLACE", "AdapterBank"]

NO_PLACE = -1
"""The place of no adapter: the index of a row that is served by the backbone alone."""

_SUMS = 8

Weights: TypeAlias = tuple[tuple[str, float], ...]
"""Names of adapters with the weights that they are summed with."""

Packed: TypeAlias = Mapping[str, NDArray[np.generic]]
"""Operands of adapters by graph input."""


class AdapterBank:
    """Adapters as operands of the model, each at its place. Threads may share it.

    An adapter keeps its place for as long as the bank lives. A weighted sum of adapters gets one
    when it is first asked for; there it stays after its last request has ended, until too many
    sums are unused: then the one that was used longest ago makes room.
    """

    def __init__(
        self,
        slots: AdapterSlots | None = None,
        names: Sequence[str] = (),
        load: Callable[[Weights], Mapping[str, LowRank]] | None = None,
        *,
        sums: int = _SUMS,
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
        self._slots = slots
        self._load = load
        self._sums = sums
        self.names = tuple(names)
        self._lock = threading.Lock()
        self._places: dict[Weights, int] = {}
        self._users: Counter[Weights] = Counter()
        self._inputs: tuple[int, dict[str, NDArray[np.generic]]] = (0, {})
        singles: list[Weights] = [((name, 1.0),) for name in self.names]
        if slots is not None and load is not None and singles:
            stacked = stack_adapters(slots, [pack_adapter(slots, load(one)) for one in singles])
            self._inputs = (1, stacked)
            self._places = {one: place for place, one in enumerate(singles)}

    @property
    def inputs(self) -> tuple[int, dict[str, NDArray[np.generic]]]:
        """A number that changes with the bank, and its arrays by graph input.

        The arrays are never written to: who has them may go on with them.
        """
        return self._inputs

    def check(self, adapter: AdapterChoice) -> Weights:
        """What ``adapter`` asks for.

        Raises:
          RequestError: there is no such adapter.
        """
        weights = adapter_weights(adapter)
        for name, _ in weights:
            if name in self.names:
                continue
            if self._slots is None:
                raise RequestError(
                    f"adapter '{name}': the artifact takes no adapters: "
                    "build it with 'onnxruntime.adapter_type: int8'"
                )
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
        packed = None
        while True:
            with self._lock:
                if weights in self._places or packed is not None:
                    place = self._place(weights, packed)
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

    def _pack(self, weights: Weights) -> Packed:
        # What has no slots or no files has no names, and nothing can be asked of it.
        assert self._slots is not None  # noqa: S101
        assert self._load is not None  # noqa: S101
        return pack_adapter(self._slots, self._load(weights))

    def _place(self, weights: Weights, packed: Packed | None) -> int:
        """The place of a sum, which becomes the one used last; ``packed`` gets one if it is new."""
        place = self._places.get(weights)
        if place is None:
            assert packed is not None  # noqa: S101 - the caller has seen to it
            return self._add(weights, packed)
        if place >= len(self.names):
            self._places[weights] = self._places.pop(weights)
        return place

    def _add(self, weights: Weights, packed: Packed) -> int:
        assert self._slots is not None  # noqa: S101 - or there was nothing to pack
        version, arrays = self._inputs
        unused = [one for one in list(self._places)[len(self.names) :] if not self._users[one]]
        if len(unused) >= self._sums:
            place = self._places[unused[0]]
            banks = [
                {name: array[:place] for name, array in arrays.items()},
                packed,
                {name: array[place + 1 :] for name, array in arrays.items()},
            ]
            stacked = stack_adapters(self._slots, [one for one in banks if _size(one)])
            del self._places[unused[0]]
        else:
            place = len(self._places)
            stacked = stack_adapters(self._slots, [arrays, packed])
        self._places[weights] = place
        self._inputs = (version + 1, stacked)
        return place


def _size(bank: Packed) -> int:
    return max(map(len, bank.values()), default=1)
