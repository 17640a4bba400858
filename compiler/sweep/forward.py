"""The forward pass over calibration windows that layer passes and surveys take statistics from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
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
      live: batches whose values make up the point that was reached.
    """

    def __init__(
        self,
        executor: Executor,
        batches: Sequence[Batch],
        weight_of: WeightOf,
        *,
        match: Literal["weights", "outputs"],
    ) -> None:
        """Set out from graph inputs.

        Args:
          executor: runs both.
          batches: the windows, graph inputs set.
          weight_of: what each linear multiplies with, asked once all of its group are solved.
          match: ``outputs`` has the original model run beside it.
        """
        self._executor = executor
        self._products = gram_products(executor.precision)
        self._weight_of = weight_of
        self._batches = list(batches)
        self._originals = (
            [replace(batch, values=dict(batch.values)) for batch in batches]
            if match == "outputs"
            else []
        )
        self.live = [*self._batches, *self._originals]

    def start(self) -> None:
        """Compute what stands before the first linears."""
        self._executor.start(self._batches)
        # Nothing is compressed yet: the original holds the same, masks for the whole way included.
        for original, batch in zip(self._originals, self._batches, strict=False):
            original.values = dict(batch.values)

    def show(self, group: LinearGroup) -> None:
        """Let ``group`` see its input."""
        group.activations = inputs_over(self._executor, group, self._batches)
        group.products = self._products
        if self._originals:
            group.originals = inputs_over(self._executor, group, self._originals)

    def step(self, level: int) -> None:
        """Compute the linears of ``level``, as they are now and as they were."""
        self._executor.step(level, self._batches, self._weight_of)
        if self._originals:
            self._executor.step(level, self._originals, original_weight)


def inputs_over(executor: Executor, group: LinearGroup, batches: Sequence[Batch]) -> Activations:
    """The input of ``group`` over ``batches``, batch by batch, at the level that they are at."""
    width = group.linears[0].in_features

    def activations() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for batch in batches:
            # Beyond lies what the original model computes past a factor.
            yield executor.inputs_of(group, batch)[:, :width], batch.token_weights

    return activations


def original_weight(linear: Linear) -> NDArray[np.float32]:
    """What the original model multiplies with where ``linear`` stands.

    It has ``W`` where an earlier sweep has put ``u v``: so that it goes on as it was, ``v`` hands
    ``W x`` on beside its own ``v x``, and ``u`` lets it pass.
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

    Solvers factor matrices a thousand wide between short loops: a second thread would gain a fifth
    of the time and spend all of it waiting. Statistics are large products and take every thread.
    """
    if isinstance(layer_pass, Calibrate):
        return nullcontext()
    limit: AbstractContextManager[object] = _BLAS.limit(limits=1, user_api="blas")
    return limit
