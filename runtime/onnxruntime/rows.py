"""Rows of text that ONNX Runtime decodes together: a key/value cache, and runs of the model on it.

The fused attention updates its cache in place: one buffer ``[rows, heads, capacity, head]`` a layer
is bound as its past and as its present. Rows are padded on the right and may differ in length,
which the mask gives. A run with several tokens on a cache takes one row only, so that a prompt is
processed row by row, through views of the buffers; one token each is decoded for all rows at once.
Nothing behind a row's end is ever read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import BackendError
from eoracc.plugins.op import ADAPTER_INDEX
from eoracc.runtime.artifact.graph_names import LOGITS_TO_KEEP, PAST, PRESENT, TEXT_LENGTHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from eoracc.runtime.decode.bank import AdapterBank
    from eoracc.runtime.onnxruntime.graph import Binding, Graph

__all__ = ["GraphRows"]

_SMALLEST = 128
"""Capacity of a new cache in tokens; it doubles when it is full."""


class GraphRows:
    """A key/value cache of several rows, and the runs that fill it.

    :class:`eoracc.runtime.decode.decoder.Rows` describes the methods.
    """

    def __init__(self, graph: Graph, bank: AdapterBank) -> None:
        self._graph = graph
        self._bank = bank
        self._lengths = np.zeros(0, np.int64)
        self._caches = graph.new_caches(0, 0)
        self._capacity = 0
        self._decoding: _DecodeStep | None = None

    def length(self, row: int) -> int:
        """Tokens in the cache of ``row``."""
        return int(self._lengths[row])

    def clear(self, row: int) -> None:
        """Start a new text in ``row``."""
        self._reserve(row + 1, 1)
        self._lengths[row] = 0

    def move(self, source: int, target: int) -> None:
        """Move the text of row ``source`` to row ``target``."""
        length = self._lengths[source]
        for cache in self._caches.values():
            cache[target, :, :length] = cache[source, :, :length]
        self._lengths[target] = length
        if self._decoding is not None:
            self._decoding.forget(target)

    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        adapter: int,
        keep: int = 1,
        text_length: int = 0,
    ) -> NDArray[np.float32]:
        """Append ``tokens`` to the text of ``row``.

        Args:
          row: cleared before its first tokens.
          tokens: at least one; the whole text must fit the model's context.
          adapter: place in the bank; negative for none.
          keep: number of last tokens to return logits of.
          text_length: tokens of the whole text, where further calls process the rest of it.

        Returns:
          Logits, ``float32 [keep, V]``.

        Raises:
          BackendError: ONNX Runtime fails.
        """
        logits: NDArray[np.float32] = self._process(
            row, [tokens], [adapter], keep, text_length=text_length
        )[0]
        return logits

    def process(
        self, texts: Sequence[Sequence[int]], *, adapters: Sequence[int], keep: int
    ) -> NDArray[np.float32]:
        """Start new texts in the first rows, all in one run.

        Args:
          texts: tokens of each row, at least one each.
          adapters: a place in the bank for each; negative for none.
          keep: number of last tokens of each row to return logits of.

        Returns:
          Logits, ``float32 [len(texts), keep, V]``; undefined before the first token of a text.

        Raises:
          BackendError: ONNX Runtime fails.
        """
        for row in range(len(texts)):
            self.clear(row)
        return self._process(0, texts, adapters, keep)

    def decode(
        self, tokens: Sequence[int], adapters: Sequence[int], *, first: int = 0
    ) -> NDArray[np.float32]:
        """Append one token to each of ``len(tokens)`` rows.

        Args:
          tokens: of the rows ``first``, ``first + 1``, …, none of which is empty.
          adapters: a place in the bank for each; negative for none.
          first: the first row.

        Returns:
          Logits, ``float32 [len(tokens), V]``, valid until the next call.

        Raises:
          BackendError: ONNX Runtime fails, or memory is exhausted; the rows have not changed.
        """
        rows = slice(first, first + len(tokens))
        self._reserve(rows.stop, int(self._lengths[rows].max()) + 1)
        if not self._graph.in_place:
            return self._decode_singly(rows, tokens, adapters)
        version, bank = self._bank.inputs
        step = self._decoding
        if step is None or not step.fits(rows, version):
            step = _DecodeStep(self._graph, self._caches, rows, version, bank)
            self._decoding = step
        logits = step.run(tokens, adapters, self._lengths[rows])
        self._lengths[rows] += 1
        return logits

    def _decode_singly(
        self, rows: slice, tokens: Sequence[int], adapters: Sequence[int]
    ) -> NDArray[np.float32]:
        """Decode row by row: attention that copies its past needs rows of one length."""
        lengths = self._lengths[rows].copy()
        parts = zip(range(rows.start, rows.stop), tokens, adapters, strict=True)
        try:
            return np.concatenate(
                [self.prefill(row, [token], adapter=adapter) for row, token, adapter in parts]
            )
        except BackendError:
            self._lengths[rows] = lengths
            raise

    def _process(
        self,
        first: int,
        texts: Sequence[Sequence[int]],
        adapters: Sequence[int],
        keep: int,
        *,
        text_length: int = 0,
    ) -> NDArray[np.float32]:
        """Append to one row or start several, which is all that the fused attention supports."""
        count, longest = len(texts), max(map(len, texts))
        rows = slice(first, first + count)
        past = int(self._lengths[first])
        self._reserve(rows.stop, past + longest)
        ids = np.zeros((count, longest), np.int64)
        lengths = np.array([len(text) for text in texts])
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        mask = (np.arange(past + longest) < past + lengths[:, None]).astype(np.int64)
        binding = self._graph.bind()
        # The declared shape is one token a row: more do not fit an array bound by us.
        binding.make("logits")
        binding.read("input_ids", ids)
        binding.read("attention_mask", mask)
        if self._graph.needs_positions:
            positions = past + np.minimum(np.arange(longest), lengths[:, None] - 1)
            binding.read("position_ids", positions.astype(np.int64))
        if self._graph.trims_logits:
            binding.read(LOGITS_TO_KEEP, np.array(keep, np.int64))
        if self._graph.long_rope is not None:
            binding.read(TEXT_LENGTHS, np.full((count, 1), text_length, np.int64))
        _bind_bank(self._graph, binding, self._bank.inputs[1], np.array(adapters, np.int32))
        presents = self._bind_caches(binding, rows, past, past + longest)
        binding.run()
        for name, present in presents.items():
            self._caches[name][rows, :, : past + longest] = present
        logits = binding.made()
        self._lengths[rows] = past + lengths
        if self._decoding is not None:
            for row in range(rows.start, rows.stop):
                self._decoding.forget(row)
        if not self._graph.trims_logits:  # an older artifact computes all logits
            ends = np.maximum(lengths[:, None] - keep + np.arange(keep), 0)
            logits = logits[np.arange(count)[:, None], ends]
        return logits.astype(np.float32, copy=False)

    def _bind_caches(
        self, binding: Binding, rows: slice, past: int, total: int
    ) -> dict[str, NDArray[np.generic]]:
        """Bind the caches of ``rows``; returns arrays to copy into them after the run, if any."""
        if self._graph.in_place:
            _bind_in_place(binding, self._caches, rows)
            return {}
        presents: dict[str, NDArray[np.generic]] = {}
        for name, cache in self._caches.items():
            binding.read(name, np.ascontiguousarray(cache[rows, :, :past]))
            count, heads, _, size = cache[rows].shape
            presents[name] = np.empty((count, heads, total, size), cache.dtype)
            binding.write(name.replace(PAST, PRESENT, 1), presents[name])
        return presents

    def _reserve(self, rows: int, tokens: int) -> None:
        """Grow the cache; both sizes double, so that the total cost of growing is low."""
        held = len(self._lengths)
        if rows <= held and tokens <= self._capacity:
            return
        capacity = max(self._capacity, _SMALLEST)
        while capacity < tokens:
            capacity *= 2
        # The rotary embedding has no angles beyond the context.
        capacity = min(capacity, max(self._graph.context_length, tokens))
        count = held if rows <= held else max(rows, 2 * held)
        try:
            grown = self._graph.new_caches(count, capacity)
        except MemoryError:
            raise BackendError(
                f"there is no memory for {count} texts of {capacity} tokens: serve fewer or shorter"
            ) from None
        for name, cache in self._caches.items():
            for row, length in enumerate(self._lengths):
                grown[name][row, :, :length] = cache[row, :, :length]
        self._caches, self._capacity = grown, capacity
        self._lengths = np.concatenate([self._lengths, np.zeros(count - held, np.int64)])
        self._decoding = None


class _DecodeStep:
    """Decoding of one token for each of some rows, bound once and run many times."""

    def __init__(
        self,
        graph: Graph,
        caches: dict[str, NDArray[np.generic]],
        rows: slice,
        version: int,
        bank: dict[str, NDArray[np.generic]],
    ) -> None:
        count = rows.stop - rows.start
        capacity = next(iter(caches.values())).shape[2]
        self._rows = rows
        self._version = version
        # The mask is as wide as the cache, so that no shape changes between runs.
        self._ids = np.zeros((count, 1), np.int64)
        self._mask = np.zeros((count, capacity), np.int64)
        self._positions = np.zeros((count, 1), np.int64)
        self._adapters = np.full(count, -1, np.int32)
        self._logits = graph.new_logits(count, 1)
        self._known = np.zeros(count, np.int64)
        self._binding = binding = graph.bind()
        binding.read("input_ids", self._ids)
        binding.read("attention_mask", self._mask)
        if graph.needs_positions:
            binding.read("position_ids", self._positions)
        binding.write("logits", self._logits)
        _bind_bank(graph, binding, bank, self._adapters)
        _bind_in_place(binding, caches, rows)

    def fits(self, rows: slice, version: int) -> bool:
        """Whether these rows and this version of the bank are bound."""
        return self._rows == rows and self._version == version

    def forget(self, row: int) -> None:
        """Reset the mask of ``row``, which has another text now."""
        if self._rows.start <= row < self._rows.stop:
            self._known[row - self._rows.start] = 0
            self._mask[row - self._rows.start] = 0

    def run(
        self, tokens: Sequence[int], adapters: Sequence[int], lengths: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits ``[rows, V]``; ``lengths`` are without the new tokens."""
        for row in np.flatnonzero(self._known <= lengths):
            self._mask[row, self._known[row] : lengths[row] + 1] = 1
        self._known[:] = lengths + 1
        self._ids[:, 0] = tokens
        self._positions[:, 0] = lengths
        self._adapters[:] = adapters
        self._binding.run()
        return self._logits[:, 0].astype(np.float32, copy=False)


def _bind_in_place(binding: Binding, caches: dict[str, NDArray[np.generic]], rows: slice) -> None:
    for name, cache in caches.items():
        binding.read(name, cache[rows])
        binding.write(name.replace(PAST, PRESENT, 1), cache[rows])


def _bind_bank(
    graph: Graph,
    binding: Binding,
    bank: dict[str, NDArray[np.generic]],
    adapters: NDArray[np.int32],
) -> None:
    """Bind the bank; without one the model's defaults remain, an adapter of rank 0.

    Each bound input costs time in every run, and there are four for each fused linear. So arrays
    that are the session's defaults are not bound.
    """
    for name, array in bank.items():
        if not graph.reads_by_default(name, array):
            binding.read(name, array)
    if bank:
        binding.read(ADAPTER_INDEX, adapters)
