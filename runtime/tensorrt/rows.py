"""Rows of text on an engine: prompts are processed in chunks, tokens decoded in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import BackendError
from eoracc.runtime.artifact.graph_names import LOGITS_POSITIONS, WRITE_INDICES
from eoracc.runtime.tensorrt.cuda import aligned
from eoracc.runtime.tensorrt.dtypes import from_engine, storage_type
from eoracc.runtime.tensorrt.groups import Text, group_of
from eoracc.runtime.tensorrt.network import Network

if TYPE_CHECKING:
    from eoracc.runtime.tensorrt.cuda import Device, Memory

__all__ = ["TensorRTRows"]


class TensorRTRows:
    """Rows of text on a GPU; :class:`eoracc.runtime.decode.decoder.Rows` describes the methods."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._texts: list[Text] = []
        self._scratch = _Scratch(network.device)

    def length(self, row: int) -> int:
        """Tokens in the cache of ``row``."""
        return self._texts[row].length

    def clear(self, row: int) -> None:
        """Start a new text in ``row``."""
        self._texts.extend(Text() for _ in range(row + 1 - len(self._texts)))
        self._texts[row] = Text()

    def move(self, source: int, target: int) -> None:
        """Move the text of row ``source`` to row ``target``; ``source`` is empty afterwards."""
        self._texts[target] = self._texts[source]
        self._texts[source] = Text()

    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        adapter: int,
        keep: int = 1,
        text_length: int = 0,  # noqa: ARG002 - no text is so long that it decides anything
    ) -> NDArray[np.float32]:
        """Append ``tokens`` to the text of ``row``."""
        ids = np.array([tokens], np.int64)
        logits: NDArray[np.float32] = self._append([self._texts[row]], ids, adapter, keep)[0]
        return logits

    def process(
        self, texts: Sequence[Sequence[int]], *, adapters: Sequence[int], keep: int
    ) -> NDArray[np.float32]:
        """Start new texts; those of equal length share a call, and none is padded."""
        for row in range(len(texts)):
            self.clear(row)
        logits = np.zeros((len(texts), keep, self._network.vocabulary), np.float32)
        for part in self._network.parts(list(zip(map(len, texts), adapters, strict=True))):
            own = min(keep, len(texts[part[0]]))
            ids = np.array([texts[row] for row in part], np.int64)
            logits[part, keep - own :] = self._append(
                [self._texts[row] for row in part], ids, adapters[part[0]], own
            )
        return logits

    def decode(
        self, tokens: Sequence[int], adapters: Sequence[int], *, first: int = 0
    ) -> NDArray[np.float32]:
        """Append one token to each of ``len(tokens)`` rows."""
        logits = np.empty((len(tokens), self._network.vocabulary), np.float32)
        calls = []
        for part in self._network.parts(list(adapters)):
            call = _Call(self._network, [self._texts[first + index] for index in part])
            ids = np.array([[tokens[index]] for index in part], np.int64)
            logits[part] = call.run(ids, adapters[part[0]], 1, self._scratch)[:, 0]
            calls.append(call)
        # Only after all calls have succeeded: a failure must not change any row.
        for call in calls:
            call.commit()
        return logits

    def _append(
        self, texts: Sequence[Text], ids: NDArray[np.int64], adapter: int, keep: int
    ) -> NDArray[np.float32]:
        """Append ``ids [n, S]`` to ``n`` texts; returns the last logits, ``[n, keep, V]``."""
        before = [text.length for text in texts]
        logits = []
        done = 0
        try:
            for size, wanted in self._network.chunks(ids.shape[1], keep):
                call = _Call(self._network, texts)
                part = np.ascontiguousarray(ids[:, done : done + size])
                done += size
                # An engine computes the logits of at least one token.
                computed = call.run(part, adapter, max(wanted, 1), self._scratch)
                logits.append(computed[:, computed.shape[1] - wanted :])
                call.commit()
        except BackendError:
            for text, length in zip(texts, before, strict=True):
                text.length = length
            raise
        return np.concatenate(logits, axis=1)


class _Scratch:
    """Memory that successive calls reuse."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: dict[str, Memory] = {}

    def take(self, name: str, nbytes: int) -> int:
        """Address of at least ``nbytes`` with arbitrary content."""
        memory = self._memory.get(name)
        if memory is None or memory.nbytes < nbytes:
            self._memory.pop(name, None)
            memory = self._memory[name] = self._device.allocate(2 * nbytes)
        return memory.address


class _Call:
    """A call that appends tokens to each text of a group."""

    def __init__(self, network: Network, texts: Sequence[Text]) -> None:
        self._network = network
        self._texts = texts
        self._group = group_of(network, texts)
        self._tokens = 0

    def run(
        self, ids: NDArray[np.int64], adapter: int, keep: int, scratch: _Scratch
    ) -> NDArray[np.float32]:
        """Run the call; the texts do not change before :meth:`commit`.

        Args:
          ids: ``[n, S]``.
          adapter: place in the bank, the same for all texts.
          keep: number of last tokens to return logits of, 1 to ``S``.
          scratch: memory for inputs and logits.

        Returns:
          ``[n, keep, V]``.

        Raises:
          BackendError: the call fails.
        """
        network, group = self._network, self._group
        rows, self._tokens = ids.shape
        total = group.total(max(text.length for text in self._texts), self._tokens)
        target = group.target(self._tokens)
        factors = network.adapters.at(adapter)
        addresses = self._upload_inputs(ids, total, keep, scratch) | dict(factors.addresses)
        for tensor, old, new in zip(
            network.caches, group.current.addresses, target.addresses, strict=True
        ):
            addresses[tensor.past], addresses[tensor.present] = old, new
        shape = (rows, keep, network.vocabulary)
        logits = np.empty(shape, storage_type(network.logits_type))
        addresses["logits"] = scratch.take("logits", logits.nbytes)
        network.contexts.enqueue(
            network.dims(
                batch=rows, sequence=self._tokens, total=total, rank=factors.rank, kept=keep
            ),
            addresses,
        )
        network.device.download(addresses["logits"], logits)
        # The call must end before memory that it reads or writes is freed or changed.
        network.device.synchronize()
        return from_engine(logits, network.logits_type)

    def _upload_inputs(
        self, ids: NDArray[np.int64], total: int, keep: int, scratch: _Scratch
    ) -> dict[str, int]:
        """Upload tokens, mask and positions in one copy; returns the addresses by input."""
        rows, tokens = ids.shape
        # [n, 1] each.
        starts = np.array([[text.start] for text in self._texts])
        lengths = np.array([[text.length] for text in self._texts])
        columns, ends = np.arange(total), starts + lengths + tokens
        kept = np.arange(tokens - keep, tokens)
        values: dict[str, NDArray[Any]] = {
            "input_ids": ids,
            "attention_mask": (columns >= starts) & (columns < ends),
            "position_ids": lengths + np.arange(tokens),
            LOGITS_POSITIONS: np.broadcast_to(kept, (rows, keep)),
            WRITE_INDICES: (starts + lengths)[:, 0],
        }
        arrays = {
            binding.name: values[binding.name].astype(binding.dtype)
            for binding in self._network.engines.bindings
            if binding.name in values
        }
        places = np.cumsum([0, *(aligned(array.nbytes) for array in arrays.values())]).tolist()
        staged = np.zeros(places[-1], np.uint8)
        for array, start in zip(arrays.values(), places, strict=False):
            staged[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        address = scratch.take("inputs", staged.nbytes)
        self._network.device.upload(staged, address)
        return {name: address + start for name, start in zip(arrays, places, strict=False)}

    def commit(self) -> None:
        """Extend the texts by the tokens of the call."""
        self._group.advance(self._tokens)
        for text in self._texts:
            text.length += self._tokens
