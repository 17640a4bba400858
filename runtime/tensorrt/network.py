"""An engine that is ready to be called, with the properties of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.runtime.artifact.graph_names import PAST, PRESENT
from eoracc.runtime.tensorrt.dtypes import storage_type

if TYPE_CHECKING:
    from eoracc.runtime.tensorrt.adapters import DeviceAdapters
    from eoracc.runtime.tensorrt.contexts import Contexts
    from eoracc.runtime.tensorrt.cuda import Device
    from eoracc.runtime.tensorrt.engine_set import EngineSet

__all__ = ["CacheTensor", "Network"]


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer, ``[B, heads, columns, head]``.

    Attributes:
      past: name of the input.
      present: name of the output.
      heads: number of heads.
      width: bytes of one head's vector.
    """

    past: str
    present: str
    heads: int
    width: int


class Network:
    """An engine with its GPU and its adapters.

    Attributes:
      device: the GPU.
      contexts: for calls of the engine.
      adapters: for calls of the engine.
      engines: description of the engine.
      context_length: most tokens of a row.
      vocabulary: number of logits of a token.
      logits_type: type of the logits, as engines.json names it.
      capacity: columns of a cache in place; None if each call writes a longer cache.
      caches: tensors of all keys and values.
      max_batch: most rows of a decoding call.
    """

    def __init__(
        self, device: Device, contexts: Contexts, engines: EngineSet, adapters: DeviceAdapters
    ) -> None:
        self.device = device
        self.contexts = contexts
        self.adapters = adapters
        self.engines = engines
        self.context_length = engines.context_length
        logits = engines.binding("logits")
        self.vocabulary = int(logits.shape[2])
        self.logits_type = logits.dtype
        # The name of this dynamic dimension is arbitrary.
        self._kept = str(logits.shape[1])
        pasts = [binding for binding in engines.bindings if binding.name.startswith(PAST)]
        self.caches = [
            CacheTensor(
                past=past.name,
                present=past.name.replace(PAST, PRESENT, 1),
                heads=int(past.shape[1]),
                width=int(past.shape[3]) * storage_type(past.dtype).itemsize,
            )
            for past in pasts
        ]
        in_place = engines.cache_layout == "in_place"
        self.capacity = int(pasts[0].shape[2]) if in_place else None
        ranges = [profile.dims for profile in engines.profiles]
        # Fewest and most tokens of a call, and the most that may get logits.
        self._sequences = [
            (dims["sequence"][0], dims["sequence"][2], dims[self._kept][2]) for dims in ranges
        ]
        single = [dims["batch"][2] for dims in ranges if dims["sequence"][0] == 1]
        self.max_batch = max(single, default=1)

    def dims(
        self, *, batch: int, sequence: int, total: int, rank: int, kept: int
    ) -> dict[str, int]:
        """Size of every dynamic dimension of a call.

        Args:
          batch: number of rows.
          sequence: tokens of each row.
          total: columns that attention reads, with those of the new tokens.
          rank: of the adapter.
          kept: tokens of each row that get logits.
        """
        sizes = {"batch": batch, "sequence": sequence, "total": total, "rank": rank}
        return {**sizes, "past": total - sequence, self._kept: kept}

    def parts(self, kinds: Sequence[Hashable]) -> Iterator[list[int]]:
        """Split rows into calls: rows of one kind, at most ``max_batch``.

        Args:
          kinds: of every row: properties that all rows of a call share, for example the adapter.

        Yields:
          Indices of the rows of a call.
        """
        alike: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(index)
        for indices in alike.values():
            for start in range(0, len(indices), self.max_batch):
                yield indices[start : start + self.max_batch]

    def chunks(self, count: int, keep: int) -> Iterator[tuple[int, int]]:
        """Split ``count`` tokens of a row into calls; the last ``keep`` tokens need logits.

        Yields:
          The number of tokens of each call, and of the last tokens in it that need logits.
        """
        done, first = 0, count - keep
        while done < count:
            before = max(first - done, 0)
            sizes = [
                min(count - done, high, before + logits)
                for low, high, logits in self._sequences
                if low <= min(count - done, before + logits)
            ]
            # If nothing fits, the call fails with an error that names the allowed ranges.
            size = max(sizes, default=1)
            done += size
            yield size, max(0, size - before)
