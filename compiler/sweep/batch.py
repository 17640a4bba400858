"""Batches of token windows, with the values that a forward pass has computed for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.graph.linears import Linear
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.onnxruntime.session import token_positions

__all__ = ["Array", "Batch", "FactorsOf", "Float", "WeightOf", "make_batches"]

Array = NDArray[np.generic]
Float = NDArray[np.float32]

WeightOf = Callable[[Linear], Float]
"""The weight that a forward pass uses for a linear, ``float32 [N, K]``."""

FactorsOf = Callable[[Linear, "Batch"], LowRank | None]
"""The low-rank term that a forward pass adds to a linear for one batch."""


@dataclass(eq=False)
class Batch:
    """A batch of token windows and the values that are alive at the current level.

    Attributes:
      attention_mask: ``int64 [batch, sequence]``, 0 for padding.
      values: by value name; the graph inputs at first.
      weights: ``float32 [batch]``, the weight of each window's tokens in statistics; None for 1.
      previous: the batch whose cache this one continues, run by the same executor before it; None
        for an empty cache.
    """

    attention_mask: NDArray[np.int64]
    values: dict[str, Array] = field(default_factory=dict)
    weights: Float | None = None
    previous: Batch | None = None

    @property
    def token_weights(self) -> Float:
        """The weight of each token, 0 for padding, ``float32 [batch * sequence]``."""
        weights = self.attention_mask.astype(np.float32)
        if self.weights is not None:
            weights *= self.weights[:, None]
        return weights.reshape(-1)


def make_batches(
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    *,
    size: int,
    weights: Float | None = None,
) -> list[Batch]:
    """Cut windows ``[samples, sequence]`` into batches of at most ``size`` and set graph inputs."""
    batches = []
    for start in range(0, len(input_ids), size):
        mask = attention_mask[start : start + size]
        values: dict[str, Array] = {
            "input_ids": input_ids[start : start + size],
            "attention_mask": mask,
            "position_ids": token_positions(mask),
        }
        window_weights = None if weights is None else weights[start : start + size]
        batches.append(Batch(mask, values, window_weights))
    return batches
