"""An artifact in plain ONNX Runtime: logits and a key/value cache, in NumPy.

The parity check runs artifacts in this form, and other servers may build on it;
:mod:`eoracc.runtime.model` generates text. Rows of a batch are padded on the right: the fused
attention counts the ones of the mask and takes them to be the first positions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.graph_names import LOGITS_TO_KEEP, PAST, PRESENT
from eoracc.runtime.artifact.long_rope import LongRope
from eoracc.runtime.onnxruntime.inference import DTYPES, open_inference
from eoracc.runtime.onnxruntime.native_library import native_path

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Cache", "Session", "open_session", "token_positions"]

Cache = Mapping[str, NDArray[np.generic]]
"""Keys and values by input name, ``past_key_values.<i>.key|value``: ``[B, heads, P, head]``."""


class Session:
    """A decoder in ONNX Runtime.

    Attributes:
      operands: further inputs of every call by name, for example those of an adapter
        (:func:`eoracc.plugins.adapters.pack_adapter`).
    """

    def __init__(self, inference: Any) -> None:  # noqa: ANN401 - onnxruntime has no types
        self._inference = inference
        self.operands: Mapping[str, NDArray[np.generic]] = {}
        inputs = {value.name: value for value in inference.get_inputs()}
        self._needs_positions = "position_ids" in inputs
        optional = {value.name for value in inference.get_overridable_initializers()}
        self._trims_logits = LOGITS_TO_KEEP in optional
        self._empty = {
            name: (DTYPES[value.type], value.shape)
            for name, value in inputs.items()
            if name.startswith(PAST)
        }
        self._long_rope = LongRope.of(inference.get_modelmeta().custom_metadata_map)
        self._outputs = [value.name for value in inference.get_outputs()]

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64] | None = None,
        past: Cache | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[NDArray[np.float32], Cache]:
        """Call the model once.

        Args:
          input_ids: ``[B, S]``, the tokens after the past.
          attention_mask: ``[B, P + S]``, past included, padded on the right; None means all ones.
          past: returned by the previous call; None in the first one.
          last_only: compute only the logits of each row's last token.

        Returns:
          Logits ``float32 [B, S, V]``, undefined at padding, or ``[B, 1, V]``; and the cache, S
          tokens longer.
        """
        batch, length = input_ids.shape
        past = self._no_past(batch) if past is None else past
        past_length = next((array.shape[2] for array in past.values()), 0)
        if attention_mask is None:
            attention_mask = np.ones((batch, past_length + length), np.int64)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **past,
            **self.operands,
        }
        if self._needs_positions:
            positions = token_positions(attention_mask)
            feeds["position_ids"] = np.ascontiguousarray(positions[:, past_length:])
        if self._trims_logits and not last_only:
            feeds[LOGITS_TO_KEEP] = np.array(length, np.int64)
        results = dict(zip(self._outputs, self._inference.run(None, feeds), strict=True))
        present = {
            name.replace(PRESENT, PAST, 1): array
            for name, array in results.items()
            if name.startswith(PRESENT)
        }
        logits: NDArray[np.float32] = results["logits"].astype(np.float32, copy=False)
        last = np.clip(attention_mask.sum(axis=1) - 1 - past_length, 0, length - 1)
        if last_only:
            if not self._trims_logits:  # an older artifact
                logits = logits[np.arange(batch), last][:, None]
        elif self._trims_logits:
            # Logits come as those of the last tokens of each row; padding may follow them.
            for row in np.flatnonzero(last < length - 1):
                logits[row] = np.roll(logits[row], last[row] + 1, axis=0)
        return logits, present

    def run_chunks(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        chunks: Sequence[int],
    ) -> NDArray[np.float32]:
        """Logits ``[B, S, V]`` of ``input_ids [B, S]``, fed through the cache in ``chunks``.

        Args:
          input_ids: ``[B, S]``.
          attention_mask: ``[B, S]``, padded on the right.
          chunks: lengths of the calls; they add up to S.
        """
        parts: list[NDArray[np.float32]] = []
        past: Cache | None = None
        start = 0
        for length in chunks:
            end = start + length
            logits, past = self.run(input_ids[:, start:end], attention_mask[:, :end], past)
            parts.append(logits)
            start = end
        return np.concatenate(parts, axis=1)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, stop: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of a batch of prompts.

        Args:
          prompts: token ids, at least one each.
          max_new_tokens: of each continuation.
          stop: token ids that end a continuation; they are not part of it.
        """
        ids, mask = _padded(prompts)
        logits, past = self.run(ids, mask, last_only=True)
        continuations: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        for step in range(max_new_tokens):
            tokens = logits[:, -1].argmax(axis=-1)
            running &= ~np.isin(tokens, stop)
            for row in np.flatnonzero(running):
                continuations[row].append(int(tokens[row]))
            if not running.any() or step + 1 == max_new_tokens:
                break
            if self._long_rope is not None and self._long_rope.original in mask.sum(1)[running]:
                # The cache of a row that outgrows this length has keys of short texts.
                parts = zip(prompts, continuations, strict=True)
                ids, mask = _padded([[*prompt, *continuation] for prompt, continuation in parts])
                logits, past = self.run(ids, mask, last_only=True)
                continue
            mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)
            logits, past = self.run(tokens[:, None].astype(np.int64), mask, past, last_only=True)
        return continuations

    def _no_past(self, batch: int) -> Cache:
        return {
            name: np.zeros((batch, shape[1], 0, shape[3]), dtype)
            for name, (dtype, shape) in self._empty.items()
        }


def _padded(texts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and mask ``[B, S]`` of texts, padded on the right."""
    lengths = np.array([len(text) for text in texts])
    mask = (np.arange(lengths.max(initial=0)) < lengths[:, None]).astype(np.int64)
    ids = np.zeros_like(mask)
    for index, text in enumerate(texts):
        ids[index, : len(text)] = text
    return ids, mask


def token_positions(attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among the valid tokens of its row, ``int64 [B, S]``."""
    positions: NDArray[np.int64] = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
    return positions


def open_session(
    folder: Path, *, library: Path | bool = True, threads: int | None = None, lean: bool = False
) -> Session:
    """Open the artifact in ``folder``.

    The caller verifies the manifest first
    (:func:`eoracc.runtime.artifact.manifest.verify_manifest`); :func:`eoracc.runtime.model.load`
    does so itself.

    Args:
      folder: the artifact.
      library: the native library to register; True for that of the installed eoracc. Without one,
        False, the fused op runs through its model-local function, in any ONNX Runtime.
      threads: that one operator uses; None for ONNX Runtime's default.
      lean: save memory. Without the library, ONNX Runtime would dequantize all weights at load,
        which takes several times their memory and makes calls fast; if lean, it dequantizes them
        in every call.

    Raises:
      BackendError: ONNX Runtime is missing or rejects the model.
      ArtifactError: genai_config.json is missing or damaged.
    """
    files = read_model_files(folder)
    native = native_path(library)
    return Session(open_inference(str(files.model), native, threads, str(files.model), lean=lean))
