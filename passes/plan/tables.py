"""The ways to store embeddings and heads, and what their errors cost, for a budget of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import PassError
from eoracc.passes.graph.embeddings import Embedding
from eoracc.passes.graph.logits import LogitSteps
from eoracc.passes.plan.items import Item, Option
from eoracc.passes.plan.predictions import prediction_losses, softmax
from eoracc.passes.quantize.embedding_tables import embedding_options
from eoracc.passes.quantize.row_blocks import row_blocks, rows_of
from eoracc.passes.solvers.allocation import Candidate
from eoracc.passes.solvers.factors import gram_root
from eoracc.passes.statistics import require_gram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.quantize.quantization import EmbeddingBits, Quantization
    from eoracc.passes.survey import CalibrationWindows, SurveyContext
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["Tables"]

_SAMPLE = 1024
"""Tokens at most on which errors of a head are measured."""

_SAMPLE_LOGITS = 2**26
"""Logits of these tokens at most, 268 MB of float32."""


@dataclass(frozen=True, eq=False)
class Tables:
    """Embeddings and heads of a model, the tables beside its decoder blocks.

    Attributes:
      name: of the survey, for messages.
      quantizer: the pass that will store them.
      widths: bits to choose from; empty keeps those of ``quantizer``.
      windows: the calibration text.
      heads: outside of the decoder blocks, of the original model.
      embeddings: that tokens look up, likewise.
    """

    name: str
    quantizer: Quantization
    widths: Sequence[EmbeddingBits]
    windows: CalibrationWindows
    heads: Sequence[Linear]
    embeddings: Sequence[Embedding]

    @classmethod
    def of(
        cls,
        name: str,
        widths: Sequence[EmbeddingBits],
        quantizer: Quantization,
        context: SurveyContext,
    ) -> Tables:
        """The tables of ``context``; ``widths`` count where a survey has weighed their errors."""
        embeddings = [table for table in context.embeddings if table.of_tokens]
        weighed = bool(embeddings) and all(table.output_gram for table in embeddings)
        windows = context.windows
        assert windows is not None  # noqa: S101 - the caller has checked
        return cls(
            name,
            quantizer,
            widths if weighed else (),
            windows,
            [linear for linear in context.linears if linear.block is None],
            embeddings,
        )

    def of_heads(self, group: LinearGroup) -> list[Item]:
        """The ways to store the heads of ``group``, with the embeddings that share their codes.

        Args:
          group: of the original model, with its Gram and its inputs.
        """
        items = []
        for linear in group.linears:
            shared = self._sharing(linear)
            ways = self._ways(linear)
            if not ways:
                continue
            if len(ways) == 1:
                options = [self._only_way(ways[0], linear.out_features, linear.in_features)]
            else:
                options = self._head_options(linear, ways, shared, group)
            weights = linear.out_features * linear.in_features
            names = tuple(table.name for table in shared)
            items.append(Item(linear.name, weights, options, table=True, shared_by=names))
        return items

    def of_embeddings(self) -> list[Item]:
        """The ways to store the embeddings that share the codes of no head."""
        shared = {table.name for head in self.heads for table in self._sharing(head)}
        items = []
        for table in self.embeddings:
            ways = self._ways(table)
            if table.name in shared or not ways:
                continue
            rows, width = table.shape
            if len(ways) == 1:
                options = [self._only_way(ways[0], rows, width)]
            else:
                weight, cost = table.weight(), _LookUps.of(table, self.windows)
                options = []
                for way in ways:
                    stored = way.requantize(weight, None)
                    loss = cost.loss(weight, stored)
                    options.append(Option({"bits": way.bits}, Candidate(stored.nbytes, loss)))
            items.append(Item(table.name, rows * width, options, table=True))
        return items

    def _ways(self, table: Linear | Embedding) -> list[Quantization]:
        """The options to choose from; none for a table that is left as it is."""
        plans: list[Mapping[str, int]] = []
        if self._is_weighed(table):
            plans = [{"bits": bits} for bits in self.widths]
        ways: list[Quantization] = []
        for plan in plans or [{}]:
            options = self._options(table, plan)
            if options is not None and options not in ways:  # an override may have set them
                ways.append(options)
        return ways

    def _options(self, table: Linear | Embedding, plan: Mapping[str, int]) -> Quantization | None:
        """The options that hold for ``table`` where it and its tied head have ``plan``."""
        planned = replace(table, plan={**table.plan, **plan})
        if not isinstance(planned, Embedding):
            return self.quantizer.options_for(planned)
        heads = [replace(head, plan={**head.plan, **plan}) for head in self.heads]
        return embedding_options(self.quantizer, planned, heads)[0]

    def _is_weighed(self, table: Linear | Embedding) -> bool:
        """Whether it is known what errors of ``table``, and of the heads tied to it, cost.

        A linear beside the blocks must have outputs that become logits.
        """
        if isinstance(table, Embedding):
            tied = [head for head in self.heads if head.source is table.source]
            return all(map(self._is_weighed, tied))
        rows = {one.shape[0] for one in self.embeddings}
        return table.out_features in rows and LogitSteps.of(table) is not None

    def _only_way(self, way: Quantization, rows: int, width: int) -> Option:
        return Option({"bits": way.bits}, Candidate(way.code_bytes(rows, width), 0.0))

    def _sharing(self, head: Linear) -> list[Embedding]:
        """The embeddings that are tied to ``head`` and will be stored as it is."""
        known = {linear.name: linear for linear in self.heads}[head.name]
        return [
            table
            for table in self.embeddings
            if table.source is known.source and self._ways(table) == self._ways(known)
        ]

    def _head_options(
        self,
        linear: Linear,
        ways: Sequence[Quantization],
        shared: Sequence[Embedding],
        group: LinearGroup,
    ) -> list[Option]:
        gram = require_gram(self.name, group)
        weight = linear.weight()
        steps = LogitSteps.of(linear)
        assert steps is not None  # noqa: S101 - there is one way without them
        predictions = _Predictions.of(self.name, weight, group, steps)
        look_ups = [_LookUps.of(table, self.windows) for table in shared]
        options = []
        for way in ways:
            stored = way.requantize(weight, gram)
            loss = gram.tokens * predictions.mean_loss(weight, stored)
            loss += sum(cost.loss(weight, stored) for cost in look_ups)
            options.append(Option({"bits": way.bits}, Candidate(stored.nbytes, loss)))
        return options


@dataclass(frozen=True, eq=False)
class _Predictions:
    """The predictions of a head on a sample of tokens.

    Attributes:
      inputs: of the head, ``float32 [tokens, K]``.
      weights: of the tokens, ``float32 [tokens]``.
      probabilities: ``float32 [tokens, V]``.
      slopes: of the logits by the outputs of the head, ``float32 [tokens, V]``.
    """

    inputs: NDArray[np.float32]
    weights: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    slopes: NDArray[np.float32]

    @classmethod
    def of(
        cls, name: str, weight: NDArray[np.float32], group: LinearGroup, steps: LogitSteps
    ) -> _Predictions:
        """Those of a head ``[V, K]`` on tokens at equal distances in the calibration text."""
        if group.activations is None:
            raise PassError(group.name, f"has no inputs for {name!r} to predict from")
        counts = np.concatenate([counted[counted > 0] for _, counted in group.activations()])
        sample = min(_SAMPLE, max(_SAMPLE_LOGITS // len(weight), 1), len(counts))
        chosen = np.linspace(0, len(counts) - 1, sample).astype(np.intp)
        rows, seen = [], 0
        for inputs, counted in group.activations():
            (of_text,) = np.nonzero(counted > 0)
            here = chosen[(chosen >= seen) & (chosen < seen + len(of_text))] - seen
            rows.append(inputs[of_text[here]])
            seen += len(of_text)
        found = np.concatenate(rows)
        logits, slopes = steps(found @ weight.T)
        return cls(found, counts[chosen], softmax(logits), slopes)

    def mean_loss(self, weight: NDArray[np.float32], stored: NBitsWeight) -> float:
        """Mean over tokens of what errors of the weight cost (:func:`.prediction_losses`)."""
        errors = np.empty_like(self.probabilities)
        for rows, error in _errors(weight, stored):
            errors[:, rows] = self.inputs @ error.T
        errors *= self.slopes
        losses = prediction_losses(self.probabilities, errors)
        return float(np.average(losses, weights=self.weights))


@dataclass(frozen=True, eq=False)
class _LookUps:
    """How often tokens look up each row of a table, and what errors of a row cost.

    Attributes:
      counts: of each row in the calibration text, ``float64 [rows]``.
      root: ``L`` with ``L L^T`` the Gram of the predictions' gradients at a row,
        ``float32 [width, width]``.
    """

    counts: NDArray[np.float64]
    root: NDArray[np.float32]

    @classmethod
    def of(cls, table: Embedding, windows: CalibrationWindows) -> _LookUps:
        """Those of ``table``, whose gradients a survey has taken."""
        assert table.output_gram is not None  # noqa: S101 - only with them there are ways
        root = gram_root(table.output_gram().astype(np.float64)).astype(np.float32)
        return cls(windows.counts(table.shape[0]), root * np.float32(table.scale))

    def loss(self, weight: NDArray[np.float32], stored: NBitsWeight) -> float:
        """``sum_t e_t^T G e_t`` over tokens, with the error ``e_t`` of the row of each."""
        total = 0.0
        for rows, error in _errors(weight, stored):
            used = self.counts[rows] > 0
            squares = np.square(error[used] @ self.root, dtype=np.float64).sum(axis=1)
            total += float(self.counts[rows][used] @ squares)
        return total


def _errors(
    weight: NDArray[np.float32], stored: NBitsWeight
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Blocks of rows of a weight with their errors."""
    for rows in row_blocks(weight.shape):
        yield rows, weight[rows] - rows_of(stored, rows).dequantize()
