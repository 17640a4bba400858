"""The same calls in the graph, level by level, all of them side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eoracc.compiler.eager.model import positions
from eoracc.compiler.sweep.batch import Array, Batch, Float
from eoracc.compiler.sweep.executor import Executor
from eoracc.errors import ModelError, reason
from eoracc.passes.graph.linears import Linear, LinearGroup

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from eoracc.compiler.frontend_check.calls import Call

__all__ = ["GraphRun", "past_shapes"]


def past_shapes(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Heads and their size by the name of each cache input, in the order of the graph's inputs."""
    shapes = {}
    for value in model.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            assert value.shape is not None  # noqa: S101 - the graph's own
            heads, size = value.shape[1], value.shape[3]
            assert isinstance(heads, int)  # noqa: S101 - only rows and tokens are free
            assert isinstance(size, int)  # noqa: S101
            shapes[str(value.name)] = (heads, size)
    return shapes


class GraphRun:
    """Runs every call through the graph at once, so that each weight is read once.

    Attributes:
      executor: of the graph.
      output: its logits.
    """

    def __init__(self, model: ir.Model, calls: Sequence[Call], vocabulary: int) -> None:
        """Prepare the calls.

        Args:
          model: the graph; it is only read.
          calls: the ways of calling it.
          vocabulary: number of tokens.
        """
        self.executor = Executor(model, cached=True)
        self.output = model.graph.outputs[0]
        self._calls = calls
        shapes = past_shapes(model)
        self._batches = [_batches(call, call.tokens(vocabulary), shapes) for call in calls]

    def levels(self) -> Iterator[list[LinearGroup]]:
        """Run level after level; the inputs of the groups that are yielded can be asked for.

        Raises:
          ModelError: nodes of the graph cannot run.
        """
        batches = [batch for chunks in self._batches for batch in chunks]
        try:
            self.executor.start(batches)
            for level, groups in enumerate(self.executor.levels):
                yield groups
                self.executor.step(level, batches, Linear.weight)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"the graph cannot run in ONNX Runtime: {reason(error)}") from error

    def inputs(self, group: LinearGroup) -> list[list[Float]]:
        """The group's input by call and row, ``float32 [tokens, K]``."""
        return self._rows(str(group.linears[0].input.name))

    def logits(self) -> list[list[Float]]:
        """The logits by call and row, ``float32 [tokens, V]``; after all levels."""
        return self._rows(str(self.output.name))

    def _rows(self, name: str) -> list[list[Float]]:
        found = []
        for call, chunks in zip(self._calls, self._batches, strict=True):
            whole = np.concatenate([batch.values[name] for batch in chunks], axis=1)
            found.append([whole[row, :length] for row, length in enumerate(call.lengths)])
        return found


def _batches(
    call: Call, tokens: NDArray[np.int64], shapes: Mapping[str, tuple[int, int]]
) -> list[Batch]:
    """One batch for each step of a call, which continues the cache of the one before."""
    batches: list[Batch] = []
    mask, start = call.mask(), 0
    for size in call.steps:
        first, end = call.past + start, call.past + start + size
        values: dict[str, Array] = {
            "input_ids": tokens[:, start : start + size],
            "attention_mask": mask[:, :end],
            "position_ids": positions(mask)[:, first:end],
        }
        if call.past and not start:
            values |= {name: call.cache(name, shape) for name, shape in shapes.items()}
        previous = batches[-1] if batches else None
        batches.append(Batch(mask[:, first:end], values, previous=previous))
        start += size
    return batches
