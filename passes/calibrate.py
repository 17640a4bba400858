"""Take the statistics that the solvers need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import LayerPass, Pass, Problem, register
from eoracc.passes.solvers.gram import (
    HeldOut,
    accumulate_cross,
    accumulate_gram,
    output_matching,
)
from eoracc.passes.statistics import note_too_few_tokens, saw_too_few_tokens

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Activations, Gram

__all__ = ["AskedPrecision", "Calibrate", "Precision"]

Precision = Literal["float32", "bfloat16"]
"""The precision of the operands of a forward pass; sums are float32."""

AskedPrecision = Literal["auto", "float32", "bfloat16"]
"""A precision as an option asks for it; ``auto`` depends on the processor."""


@register
@dataclass(frozen=True, kw_only=True)
class Calibrate(LayerPass):
    """Take the Gram of every linear's input over the calibration text.

    Options:
      through: ``compressed`` takes each input through the prefix as it has been compressed so far,
        so that a layer makes up for what the ones before it lost; ``original`` takes it through
        the original weights.
      match: what a compressed weight is to come near. ``weights``: the original weight ``W``.
        ``outputs``: ``T = W + W (X - X~) X~^T (X~ X~^T + 0.01 mean diagonal I)^-1``, which brings
        ``T X~`` nearest to ``W X``, where ``X`` is the linear's input in the original model and
        ``X~`` its input through the compressed prefix: what earlier layers lost is made good too.
        Takes a second forward pass over the text. A linear that fewer than 32 tokens reached is
        matched by its weight, and so is a head that is tied to the embedding.
      tokens: how tokens enter these sums, and with them the errors on record. ``unit``: every
        ``x~`` as ``x~ / ||x~||``, and its ``x`` as ``x / ||x~||``. What is lost of a token is then
        seen relative to its size, and the few of the largest do not decide for all others.
        ``equal``: as they are, which is what published methods do. ``gradients``: ``||g||`` times,
        with the gradient ``g`` of the model's predictions at the output, which a
        ``calibrate_outputs`` right before the sweep has taken: what predictions do not depend on
        counts for little, however large.
      precision: of the products of that forward pass and of the Gram's own. ``bfloat16`` rounds
        their operands to eight bits of mantissa and sums in float32; ``auto`` takes it where the
        processor has units for it (AMX), and ``float32`` elsewhere.
    """

    name: ClassVar[str] = "calibrate"
    repeats = True  # a second one begins another sweep

    through: Literal["compressed", "original"] = "compressed"
    match: Literal["weights", "outputs"] = "weights"
    tokens: Literal["unit", "equal", "gradients"] = "unit"
    precision: AskedPrecision = "auto"

    @override
    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        yield from super().problems(earlier)
        if (self.through, self.match) == ("original", "outputs"):
            yield ("match",), "contradicts 'through: original': keep one of the two"

    @override
    def requires(self, group: LinearGroup) -> None:
        if group.activations is None:
            raise PassError(group.name, "has no activations: give 'calibration' in model.yaml")
        if self.tokens == "gradients" and any(
            linear.block is not None and linear.token_weights is None for linear in group.linears
        ):
            raise PassError(
                group.name,
                "has no gradients to count tokens by: put 'calibrate_outputs' right before this "
                "sweep, or leave 'tokens: gradients' out",
            )

    @override
    def call(self, group: LinearGroup) -> None:
        assert group.activations is not None  # noqa: S101 - requires() has checked
        if self.tokens == "gradients":
            # Every pass of the sweep sees these weights.
            group.activations = _counted_by_gradients(group, group.activations)
        seen = group.activations()
        gram = accumulate_gram(
            map(_unit, seen) if self.tokens == "unit" else seen,
            group.linears[0].in_features,
            add=None if group.products is None else group.products.outer,
        )
        # One bad value anywhere reaches the diagonal: no need to scan every activation.
        if not np.isfinite(np.diag(gram.matrix)).all():
            raise PassError(
                group.name,
                "its input over the calibration text holds NaN or Inf: "
                "the checkpoint or the text is damaged",
            )
        matching = self._matching(group, gram)
        group.gram = replace(
            gram,
            activations=group.activations,
            matching=matching,
            held_out=self._held_out(group, outputs=matching is not None),
        )

    def _held_out(self, group: LinearGroup, *, outputs: bool) -> HeldOut | None:
        """The held-out tokens of ``group`` as calibration's count, without padding."""
        unit = self.tokens == "unit"
        if group.held_out is None:
            return None
        if not outputs or group.held_out_originals is None:
            batches = map(_unit, group.held_out()) if unit else group.held_out()
            return HeldOut(np.concatenate([rows[weights > 0] for rows, weights in batches]))
        parts = [
            (rows[weights > 0], difference[weights > 0])
            for difference, rows, weights in _differences(
                group.held_out, group.held_out_originals, unit=unit
            )
        ]
        inputs, differences = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return HeldOut(inputs, differences)

    def _matching(self, group: LinearGroup, gram: Gram) -> NDArray[np.float32] | None:
        """``M``, which takes the group's weights to their targets; None if they are the targets."""
        if self.match == "weights" or group.originals is None:
            return None
        if any(linear.tied for linear in group.linears):
            # An embedding looks up the same codes: rows of W, not of what serves a product.
            return None
        assert group.activations is not None  # noqa: S101 - requires() has checked
        if saw_too_few_tokens(gram):
            for linear in group.linears:
                if linear.block is not None:
                    note_too_few_tokens(
                        self.name,
                        linear,
                        gram,
                        instead="matched by its weight",
                        asks="matching outputs",
                    )
            return None
        cross = accumulate_cross(
            _differences(group.activations, group.originals, unit=self.tokens == "unit"),
            len(gram.matrix),
            add=None if group.products is None else group.products.cross,
        )
        if not np.isfinite(cross).all():
            raise PassError(
                group.name,
                "its input in the original model holds NaN or Inf over the calibration text: "
                "the checkpoint or the text is damaged",
            )
        return output_matching(gram.matrix, cross)


def _differences(
    activations: Activations, originals: Activations, *, unit: bool
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Per batch ``X - X~``, ``X~`` and the token weights; ``unit`` divides both by ``||x~||``."""
    for (inputs, weights), (original, _) in zip(activations(), originals(), strict=True):
        # Before products round: the difference of equal inputs is exactly zero.
        difference = original - inputs
        if unit:
            scale = _unit_scale(inputs)
            with np.errstate(invalid="ignore"):  # bad values are found in the sums
                yield difference * scale, inputs * scale, weights
        else:
            yield difference, inputs, weights


def _counted_by_gradients(group: LinearGroup, activations: Activations) -> Activations:
    """The group's activations, each token counted by the gradients at its linears' outputs."""
    loaded = [
        linear.token_weights() for linear in group.linears if linear.token_weights is not None
    ]
    if not loaded:
        return activations
    counts = np.sqrt(np.sum(loaded, axis=0, dtype=np.float64))
    # A mean of 1 over the tokens that predictions depend on; padding has none.
    counts = (counts / counts[counts > 0].mean() if counts.any() else counts + 1).astype(np.float32)

    def counted() -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        start = 0
        for inputs, weights in activations():
            yield inputs, weights * counts[start : start + len(weights)]
            start += len(weights)

    return counted


def _unit(
    batch: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Inputs ``[tokens, K]`` scaled to norm 1, those that are zero left so, and their weights."""
    inputs, weights = batch
    with np.errstate(invalid="ignore"):  # bad values are found in the sums
        return inputs * _unit_scale(inputs), weights


def _unit_scale(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """``1 / ||x||`` of each token, ``[tokens, 1]``; 0 for one that is zero."""
    with np.errstate(invalid="ignore"):
        norms = np.sqrt(np.einsum("tk,tk->t", inputs, inputs, dtype=np.float64))
        scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms != 0)
    shaped: NDArray[np.float32] = scale[:, None].astype(np.float32)
    return shaped
