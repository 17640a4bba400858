"""A graph for TensorRT, run by ONNX Runtime on the CPU as its float32 twin.

This checks such a graph without a GPU: call after call through the cache, in the graph's layout.
docs/targets.md lists its inputs and outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from eoracc.runtime.artifact.graph_file import read_graph
from eoracc.runtime.artifact.graph_names import (
    LOGITS_POSITIONS,
    LORA_A,
    LORA_B,
    PAST,
    PRESENT,
    WRITE_INDICES,
)
from eoracc.runtime.onnxruntime.float32_twin import float32_twin
from eoracc.runtime.onnxruntime.inference import DTYPES, open_inference
from eoracc.runtime.onnxruntime.session import token_positions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["GraphSession"]


class GraphSession:
    """A decoder lowered for TensorRT, as its float32 twin.

    Attributes:
      operands: further inputs of every call by name: factors of an adapter, ``float32``,
        ``<linear>.lora_a [R, K]`` and ``.lora_b [N, R]``. Missing ones have rank 0.
    """

    def __init__(self, inference: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._inference = inference
        self.operands: Mapping[str, NDArray[np.generic]] = {}
        inputs = {value.name: value for value in inference.get_inputs()}
        self._in_place = WRITE_INDICES in inputs
        self._pasts = {
            name: (DTYPES[value.type], value.shape)
            for name, value in inputs.items()
            if name.startswith(PAST)
        }
        self._no_adapter = {
            name: np.zeros(
                [size if isinstance(size, int) else 0 for size in value.shape], np.float32
            )
            for name, value in inputs.items()
            if name.endswith((LORA_A, LORA_B))
        }
        self._outputs = [value.name for value in inference.get_outputs()]

    @classmethod
    def open(cls, path: Path, *, rounded: bool = False, threads: int | None = None) -> GraphSession:
        """Open the graph at ``path``, its weights beside it.

        Args:
          path: an ONNX file; the caller has verified the manifest.
          rounded: see :func:`eoracc.runtime.onnxruntime.float32_twin.float32_twin`.
          threads: that one operator uses; None for ONNX Runtime's default.

        Raises:
          ArtifactError: the file cannot be read.
          BackendError: ONNX Runtime is missing or rejects the graph.
        """
        model = read_graph(path)
        proto = ir.to_proto(float32_twin(model, rounded=rounded)).SerializeToString()
        # Lean: weights are widened at every call and stay in the mapped file.
        inference = open_inference(
            proto, None, threads, str(path), lean=True, weights=path.resolve().parent
        )
        return cls(inference)

    def run_chunks(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        chunks: Sequence[int],
    ) -> NDArray[np.float32]:
        """Logits ``[B, S, V]`` of ``input_ids [B, S]``, fed through the cache in ``chunks``.

        Args:
          input_ids: ``[B, S]``.
          attention_mask: ``[B, S]``, padded anywhere.
          chunks: lengths of the calls; they add up to S.
        """
        batch = len(input_ids)
        positions = token_positions(attention_mask)
        cache: dict[str, NDArray[np.generic]] = {
            name: np.zeros((batch, *_cache_shape(shape[1:])), dtype)
            for name, (dtype, shape) in self._pasts.items()
        }
        parts: list[NDArray[np.float32]] = []
        start = 0
        for length in chunks:
            end = start + length
            feeds = {
                "input_ids": input_ids[:, start:end],
                "attention_mask": attention_mask[:, :end],
                "position_ids": positions[:, start:end],
                LOGITS_POSITIONS: np.tile(np.arange(length), (batch, 1)),
                **cache,
                **self._no_adapter,
                **self.operands,
            }
            if self._in_place:
                feeds[WRITE_INDICES] = np.full(batch, start)
            results = dict(zip(self._outputs, self._inference.run(None, feeds), strict=True))
            parts.append(results["logits"])
            cache = {name: results[name.replace(PAST, PRESENT, 1)] for name in cache}
            start = end
        return np.concatenate(parts, axis=1)


def _cache_shape(shape: Sequence[int | str]) -> tuple[int, ...]:
    """``[heads, P, D]`` of an empty cache: P is the graph's capacity, or 0 for a past."""
    return tuple(size if isinstance(size, int) else 0 for size in shape)
