"""Runs a decoder graph in ONNX Runtime through its cache, and says how exact it must be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from eoracc.compiler.eager.model import load_eager, positions, reference_logits
from tests.tiny_models import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["GraphSession", "assert_close", "assert_equals_eager", "padded_mask"]


class GraphSession:
    """A stock ONNX Runtime session of a decoder graph, with no custom-op library."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        path = folder / "graph.onnx"
        ir.save(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.optional = [value.name for value in self._session.get_overridable_initializers()]

    def last_logits(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64], keep: int | None
    ) -> NDArray[np.float32]:
        """What the graph gives for ``logits_to_keep``, left out where that is None."""
        feeds: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if keep is not None:
            feeds["logits_to_keep"] = np.array(keep, np.int64)
        logits: NDArray[np.float32] = self._session.run(
            ["logits"], feeds | self._no_past(len(input_ids))
        )[0]
        return logits

    def _no_past(self, rows: int) -> dict[str, NDArray[np.float32]]:
        return {
            value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def logits(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        *,
        chunks: Sequence[int] | None = None,
    ) -> NDArray[np.float32]:
        """The graph's counterpart of :func:`eoracc.compiler.eager.model.reference_logits`."""
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = self._no_past(len(input_ids))
        outputs = [value.name for value in self._session.get_outputs()]
        logits, start = [], 0
        for size in chunks or (input_ids.shape[1],):
            end = start + size
            feeds: dict[str, Any] = {
                "input_ids": input_ids[:, start:end],
                "attention_mask": mask[:, :end],
                "position_ids": positions(mask)[:, start:end],
            }
            feeds = {name: array for name, array in feeds.items() if name in self.inputs} | cache
            if "logits_to_keep" in self.optional:
                feeds["logits_to_keep"] = np.array(size, np.int64)
            results = dict(zip(outputs, self._session.run(None, feeds), strict=True))
            logits.append(results["logits"])
            if "logits_to_keep" in self.optional:
                # They come as the last tokens of each row, which padding may follow.
                for row, length in enumerate(mask[:, :end].sum(axis=1)):
                    padding = min(end - length, size - 1)
                    logits[-1][row] = np.roll(logits[-1][row], -padding, axis=0)
            cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
            start = end
        return np.concatenate(logits, axis=1)


def padded_mask(lengths: Sequence[int], width: int, *, left: bool) -> NDArray[np.int64]:
    """``int64 [len(lengths), width]`` with that many ones per row."""
    index = np.arange(width)[None]
    column = np.array(lengths)[:, None]
    return ((index >= width - column) if left else (index < column)).astype(np.int64)


def assert_close(
    actual: NDArray[np.float32],
    expected: NDArray[np.float32],
    config: Any,  # noqa: ANN401 - fields that only some families have
    mask: NDArray[np.int64] | None = None,
) -> None:
    """Logits of valid tokens agree to what float32 leaves of sums of these lengths.

    ``n`` operations on the way to a logit, each rounded independently, are off by ``8 sqrt(n) u``
    relative to the largest value, but for a chance of 1e-13 (Higham and Mary, 2019, SIAM J. Sci.
    Comput. 41, theorem 2.4).
    """
    hidden, tokens = config.hidden_size, expected.shape[1]
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    projections = hidden + head * config.num_attention_heads + hidden + config.intermediate_size
    layer = projections + head + tokens + 4 * hidden  # matmuls, scores, mixture, norms
    length = config.num_hidden_layers * layer + 2 * hidden
    valid = np.ones(expected.shape[:2], bool) if mask is None else mask.astype(bool)
    tolerance = 8 * length**0.5 * 2.0**-24 * np.abs(expected[valid]).max()
    assert tolerance < 1e-2 * expected[valid].std()
    np.testing.assert_allclose(actual[valid], expected[valid], rtol=0, atol=tolerance)


def assert_equals_eager(loaded: LoadedModel, folder: Path) -> None:
    """The frontend's graph gives eager transformers' logits, padded or not, at once or cached."""
    lengths = (12, 8, 5)
    length = max(lengths)
    session = GraphSession(loaded.model, folder)
    eager = load_eager(loaded.folder, {})
    input_ids = np.random.default_rng(7).integers(3, VOCABULARY, (len(lengths), length))
    left = padded_mask(lengths, length, left=True)
    right = padded_mask(lengths, length, left=False)
    cases = [
        (None, (length,)),  # prefill
        (None, (8, 1, 1, 1, 1)),  # decode through the cache, past every window
        (None, (7, 5)),  # a chunk on a cache
        (left, (length,)),
        (left, (9, 1, 1, 1)),
        (left, (8, 4)),
        (right, (length,)),
    ]
    for mask, chunks in cases:
        expected = reference_logits(eager, input_ids, mask, chunks=chunks)
        actual = session.logits(input_ids, mask, chunks=chunks)
        assert_close(actual, expected, loaded.config, mask)
