"""The forward pass over calibration windows, which layer passes and surveys take statistics of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from eoracc.compiler.sweep.batch import Batch, WeightOf
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.products import gram_products
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.solvers.gram import Activations

__all__ = ["ForwardPass", "inputs_over", "one_thread", "original_weight"]

_BLAS = ThreadpoolController()


class ForwardPass:
    """The forward pass over a text's windows, and the original model's where one is needed.

    Attributes:
      live: batches with the activations at the level reached.
    """

    def __init__(
        self,
        executor: Executor,
        batches: Sequence[Batch],
        weight_of: WeightOf,
        *,
        match: Literal["weights", "outputs"],
        held_out: Sequence[Batch] = (),
    ) -> None:
        """Begin at the graph inputs.

        Args:
          executor: runs both.
          batches: the windows, graph inputs set.
          weight_of: gives the weight of each linear, after its group has been solved.
          match: ``outputs`` runs the original model in parallel.
          held_out: windows that no statistics are taken of, to check factors with.
        """
        self._executor = executor
        self._products = gram_products(executor.precision)
        self._weight_of = weight_of
        self._calibration = len(batches)
        self._batches = [*batches, *held_out]
        self._originals = (
            [replace(batch, values=dict(batch.values)) for batch in self._batches]
            if match == "outputs"
            else []
        )
        self.live = [*self._batches, *self._originals]

    def start(self) -> None:
        """Compute everything before the first linears."""
        self._executor.start(self._batches)
        # Nothing is compressed yet: the original model has the same values, masks included.
        for original, batch in zip(self._originals, self._batches, strict=False):
            original.values = dict(batch.values)

    def run(self, position: int) -> None:
        """Compute everything before the linears of level ``position``, which are solved below it.

        Nothing is left to compute after the last level.
        """
        for level in range(min(position, self._executor.head_level)):
            if level == 0:
                self.start()
            self.step(level)

    def show(self, group: LinearGroup) -> None:
        """Give ``group`` access to its input."""
        show = partial(inputs_over, self._executor, group)
        first = self._calibration
        group.activations = show(self._batches[:first])
        group.products = self._products
        if self._originals:
            group.originals = show(self._originals[:first])
        if len(self._batches) > first:
            group.held_out = show(self._batches[first:])
            group.held_out_originals = show(self._originals[first:]) if self._originals else None

    def step(self, level: int) -> None:
        """Compute the linears of ``level``, with the new weights and with the original ones."""
        self._executor.step(level, self._batches, self._weight_of)
        if self._originals:
            self._executor.step(level, self._originals, original_weight)


def inputs_over(executor: Executor, group: LinearGroup, batches: Sequence[Batch]) -> Activations:
    """The input of ``group`` over ``batches``, batch by batch, at their current level."""
    width = group.linears[0].in_features

    def activations() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for batch in batches:
            # Further columns are the original model's output beside a factor (original_weight()).
            yield executor.inputs_of(group, batch)[:, :width], batch.token_weights

    return activations


def original_weight(linear: Linear) -> NDArray[np.float32]:
    """The weight with which ``linear`` computes the original model.

    If an earlier sweep has replaced ``W`` by ``u v``, the original product still has to go through
    both nodes: ``v`` returns ``W x`` beside its own ``v x``, and ``u`` passes it through.
    """
    whole = linear.whole
    if whole is None:
        return linear.weight()
    if linear.name == f"{whole.name}.v":
        return np.vstack([linear.weight(), whole.weight()])
    rows = linear.out_features
    return np.hstack(
        [np.zeros((rows, linear.in_features), np.float32), np.eye(rows, dtype=np.float32)]
    )


def one_thread(layer_pass: LayerPass | None = None) -> AbstractContextManager[object]:
    """Keep BLAS to one thread while a solver runs.

    Solvers factor matrices a thousand wide between short loops. A second thread would save a fifth
    of the time and spin through the rest. Statistics are large products and use every thread.
    """
    if isinstance(layer_pass, Calibrate):
        return nullcontext()
    limit: AbstractContextManager[object] = _BLAS.limit(limits=1, user_api="blas")
    return limit
