"""Adapters on the GPU: switching adapters binds other addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.graph_names import LORA_A, LORA_B
from eoracc.runtime.decode.bank import SUMS, AdapterPlaces, FactorsOf, Weights
from eoracc.runtime.tensorrt.cuda import Memory, aligned
from eoracc.runtime.tensorrt.dtypes import to_engine

if TYPE_CHECKING:
    from eoracc.plugins.operands.low_rank import LowRank
    from eoracc.runtime.tensorrt.cuda import Device
    from eoracc.runtime.tensorrt.engine_set import EngineSet

__all__ = ["DeviceAdapter", "DeviceAdapters"]


@dataclass(frozen=True, eq=False)
class DeviceAdapter:
    """One adapter in the GPU's memory.

    Attributes:
      rank: of every linear; lower ranks are padded with zeros.
      addresses: of the engine's inputs ``<linear>.lora_a [R, K]`` and ``.lora_b [N, R]``.
      memory: that holds them.
    """

    rank: int
    addresses: Mapping[str, int]
    memory: Memory


class DeviceAdapters(AdapterPlaces[DeviceAdapter]):
    """Adapters of an engine, each in a block of memory of its own."""

    def __init__(
        self,
        device: Device,
        engines: EngineSet,
        names: Sequence[str],
        load: FactorsOf,
        *,
        sums: int = SUMS,
    ) -> None:
        """Upload all adapters.

        Args:
          device: the GPU.
          engines: description of the engine.
          names: of the adapters.
          load: reads the factors of a weighted sum of adapters, by linear.
          sums: number of unused weighted sums to keep.

        Raises:
          EoraccError: an adapter is damaged or does not fit, or memory is exhausted.
        """
        takes = engines.adapter_type != "none"
        super().__init__(names, takes_adapters=takes, sums=sums)
        self.option = f"{engines.package}.adapter_type: float16"
        self._device = device
        self._load = load
        self._max_rank = engines.max_rank
        self._min_rank = min(
            (profile.dims["rank"][0] for profile in engines.profiles if "rank" in profile.dims),
            default=0,
        )
        # (N, K) of each linear with inputs, in the order of the graph.
        self._inputs = {
            binding.name: binding
            for binding in engines.bindings
            if binding.name.endswith((LORA_A, LORA_B))
        }
        self._linears = {}
        for name, binding in self._inputs.items():
            linear, suffix = name[: -len(LORA_A)], name[-len(LORA_A) :]
            if suffix == LORA_A:
                rows = self._inputs[linear + LORA_B].shape[0]
                self._linears[linear] = int(rows), int(binding.shape[1])
        self._none = self._upload({}, "no adapter")
        self._adapters = [self._pack(weights) for weights in self._singles()] if takes else []

    def at(self, place: int) -> DeviceAdapter:
        """The adapter at ``place``; for a negative place one that adds nothing.

        It stays valid for the caller when another adapter takes its place.
        """
        return self._none if place < 0 else self._adapters[place]

    @override
    def _pack(self, weights: Weights) -> DeviceAdapter:
        return self._upload(self._load(weights), " + ".join(name for name, _ in weights))

    @override
    def _put(self, place: int, packed: DeviceAdapter) -> None:
        self._adapters[place : place + 1] = [packed]

    def _upload(self, factors: Mapping[str, LowRank], name: str) -> DeviceAdapter:
        _check(factors, self._linears, name)
        rank = max([self._min_rank, *(own.rank for own in factors.values())])
        if factors and rank > self._max_rank:
            raise ArtifactError(
                f"adapter '{name}': has rank {rank}, and the engines take {self._max_rank} at "
                "most: build them with a larger 'rank'"
            )
        arrays: dict[str, NDArray[np.float32]] = {}
        for linear, (rows, columns) in self._linears.items():
            a, b = np.zeros((rank, columns), np.float32), np.zeros((rows, rank), np.float32)
            if linear in factors:
                own = factors[linear]
                a[: own.rank], b[:, : own.rank] = own.down(), own.up()
            arrays[linear + LORA_A], arrays[linear + LORA_B] = a, b
        return self._place(arrays, rank, name)

    def _place(
        self, arrays: Mapping[str, NDArray[np.float32]], rank: int, name: str
    ) -> DeviceAdapter:
        """Upload ``arrays`` in the engine's types, side by side in one block of memory."""
        stored = {key: to_engine(array, self._inputs[key].dtype) for key, array in arrays.items()}
        memory = self._device.allocate(sum(aligned(array.nbytes) for array in stored.values()))
        addresses, end = {}, memory.address
        for key, array in stored.items():
            if array.dtype == np.float16 and not np.isfinite(array).all():
                raise ArtifactError(f"adapter '{name}': {key} holds values beyond float16")
            self._device.upload(array, end)
            addresses[key] = end
            end += aligned(array.nbytes)
        self._device.synchronize()
        return DeviceAdapter(rank, addresses, memory)


def _check(
    factors: Mapping[str, LowRank], linears: Mapping[str, tuple[int, int]], name: str
) -> None:
    for linear, own in factors.items():
        shape = linears.get(linear)
        if shape is None:
            raise ArtifactError(
                f"adapter '{name}': has factors for {linear}, and the engines take none there"
            )
        held = (*own.lora_b.shape, *own.lora_a.shape)
        if held != (shape[0], own.rank, own.rank, shape[1]):
            raise ArtifactError(
                f"adapter '{name}': factors {list(own.lora_b.shape)} and "
                f"{list(own.lora_a.shape)} do not fit the {list(shape)} weight of {linear}"
            )
