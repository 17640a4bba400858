"""Weights that GPTQModel, AutoGPTQ or AutoRound have packed in the formats of GPTQ.

``qweight int32 [K * bits / 32, N]`` holds the codes along K, ``qzeros int32 [G, N * bits / 32]``
the zero points along N, each as one stream of bits, which straddles words at 3 bits;
``scales [G, N]``, and ``g_idx int32 [K]`` the group of each column. The format ``gptq`` stores zero
points less one, ``gptq_v2`` as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.compiler.imported.held import held_weight
from eoracc.errors import ModelError
from eoracc.plugins.operands.words import unpack_words, word_count
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from eoracc.compiler.imported.tensors import StoredTensors
    from eoracc.passes.graph.imported import ImportedWeight

__all__ = ["Gptq"]

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


class Gptq:
    """Reads the linears of a checkpoint."""

    part = "qweight"

    def __init__(self, tensors: StoredTensors, settings: Mapping[str, Any]) -> None:
        """Take the settings of ``quantization_config``.

        Raises:
          ModelError: the checkpoint is packed in another way.
        """
        self._tensors = tensors
        stored_in = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if stored_in not in _FORMATS:
            raise ModelError(
                f"{tensors.folder}: the weights are packed in the format {quoted(stored_in)}: save "
                f"them as {' or '.join(_FORMATS)}"
            )
        self._less_one = stored_in == "gptq"
        size = settings.get("group_size", -1)
        if type(size) is not int or (size < 1 and size != -1):
            raise ModelError(f"{tensors.folder}: {quoted(size)} is no group_size of GPTQ")
        self._group_size = size

    def weight(self, module: str, out_features: int, in_features: int) -> ImportedWeight:
        """The weight ``[N, K]`` of a linear.

        Args:
          module: its name.
          out_features: ``N``.
          in_features: ``K``.

        Raises:
          ModelError: a tensor is missing or does not fit.
        """
        tensors = self._tensors
        rows = tensors.shape(f"{module}.qweight")[0]
        bits = next((b for b in _BITS if word_count(in_features, bits=b) == rows), None)
        if bits is None:
            raise ModelError(
                f"{tensors.folder}: {printable(module)}.qweight has {rows} rows, which hold "
                f"{in_features} codes of neither 2, 3, 4 nor 8 bits: it is of another model"
            )
        codes = unpack_words(
            tensors.integers(f"{module}.qweight", (rows, out_features)),
            bits=bits,
            count=in_features,
            axis=0,
        )
        groups = self._groups(module, in_features)
        count = int(groups.max()) + 1
        scales = tensors.floats(f"{module}.scales", (count, out_features))
        words = tensors.integers(f"{module}.qzeros", (count, word_count(out_features, bits=bits)))
        zero_points = self._zero_points(words, bits=bits, count=out_features)
        return held_weight(
            np.ascontiguousarray(codes.T),
            np.ascontiguousarray(scales.T),
            np.ascontiguousarray(zero_points.T),
            bits=bits,
            groups=groups,
        )

    def _groups(self, module: str, in_features: int) -> NDArray[np.integer]:
        name = f"{module}.g_idx"
        if name not in self._tensors:
            width = in_features if self._group_size == -1 else self._group_size
            return np.arange(in_features) // width
        groups: NDArray[np.integer] = self._tensors.integers(name, (in_features,))
        count = self._tensors.shape(f"{module}.scales")[0]
        if groups.min() < 0 or groups.max() >= count:
            raise ModelError(
                f"{self._tensors.folder}: {printable(name)} names groups beyond the {count} that "
                "have scales: the checkpoint is damaged, fetch it again"
            )
        return groups

    def _zero_points(self, words: NDArray[np.int32], *, bits: int, count: int) -> NDArray[np.int32]:
        """``int32 [G, N]``."""
        if not self._less_one:
            return unpack_words(words, bits=bits, count=count, axis=1).astype(np.int32)
        if bits == 3:
            codes = unpack_words(words, bits=bits, count=count, axis=1)
            return ((codes + 1) & 7).astype(np.int32)
        # GPTQModel has taken 1 of every zero point from the whole word, and borrowed from the next
        # for those that were 0: only the sum of whole words gives all of them back.
        ones = np.uint32(sum(1 << at for at in range(0, 32, bits)))
        return unpack_words(words.view(np.uint32) + ones, bits=bits, count=count, axis=1).astype(
            np.int32
        )
