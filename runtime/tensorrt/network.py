"""An engine, ready to be called: what its inputs and outputs look like."""

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
      past: the input.
      present: the output.
      heads: of keys and values.
      width: bytes of a head's vector.
    """

    past: str
    present: str
    heads: int
    width: int


class Network:
    """An engine with its GPU and its adapters.

    Attributes:
      device: that it runs on.
      contexts: to call it through.
      adapters: that it can be called with.
      engines: what engines.json says of it.
      context_length: tokens of a row at most.
      vocabulary: width of the logits.
      capacity: columns of a cache in place; None where each call writes a longer cache.
      caches: every key and value.
      max_batch: rows of a call that decodes.
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
        # A size that calls decide has a name, and this one may be any.
        self._kept = str(logits.shape[1])
        pasts = [one for one in engines.bindings if one.name.startswith(PAST)]
        self.caches = [
            CacheTensor(
                past=one.name,
                present=one.name.replace(PAST, PRESENT, 1),
                heads=int(one.shape[1]),
                width=int(one.shape[3]) * storage_type(one.dtype).itemsize,
            )
            for one in pasts
        ]
        in_place = engines.cache_layout == "in_place"
        self.capacity = int(pasts[0].shape[2]) if in_place else None
        ranges = [profile.dims for profile in engines.profiles]
        # Fewest and most tokens of a call, and how many of them may get logits.
        self._sequences = [
            (dims["sequence"][0], dims["sequence"][2], dims[self._kept][2]) for dims in ranges
        ]
        single = [dims["batch"][2] for dims in ranges if dims["sequence"][0] == 1]
        self.max_batch = max(single, default=1)

    def dims(
        self, *, batch: int, sequence: int, total: int, rank: int, kept: int
    ) -> dict[str, int]:
        """The size of every dimension of a call.

        Args:
          batch: rows.
          sequence: tokens of each row.
          total: columns that they may look at, their own included.
          rank: of the adapter.
          kept: tokens of each row that get logits.
        """
        sizes = {"batch": batch, "sequence": sequence, "total": total, "rank": rank}
        return {**sizes, "past": total - sequence, self._kept: kept}

    def parts(self, kinds: Sequence[Hashable]) -> Iterator[list[int]]:
        """Which rows may share a call: those of one kind, as many as the engine takes.

        Args:
          kinds: of every row: what a call has only one of, its adapter for example.
        """
        alike: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            alike.setdefault(kind, []).append(index)
        for indices in alike.values():
            for start in range(0, len(indices), self.max_batch):
                yield indices[start : start + self.max_batch]

    def chunks(self, count: int, keep: int) -> Iterator[tuple[int, int]]:
        """How to feed ``count`` tokens of which the last ``keep`` want logits.

        Yields:
          The tokens of each call, and how many of the last of them want logits.
        """
        done, first = 0, count - keep
        while done < count:
            before = max(first - done, 0)
            sizes = [
                min(count - done, high, before + logits)
                for low, high, logits in self._sequences
                if low <= min(count - done, before + logits)
            ]
            # What fits nothing is tried all the same: the refusal says what would.
            size = max(sizes, default=1)
            done += size
            yield size, max(0, size - before)
