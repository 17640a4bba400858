"""Take the Gram by which errors of each linear's output are weighed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import safe_open
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.calibrate import AskedPrecision, Calibrate
from eoracc.passes.survey import SurveyPass

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.survey import SurveyContext

__all__ = ["CalibrateOutputs"]

_FOLDER = "output_grams"
_GRAM = "output_gram"

OutputGram = Callable[[], NDArray[np.float32]]


@register
@dataclass(frozen=True, kw_only=True)
class CalibrateOutputs(SurveyPass):
    """Take a Gram of every linear's output, by which errors of the output are weighed.

    ``eora`` and ``caldera`` in the next sweep then minimise ``tr(G E H E^T)`` in place of
    ``tr(E H E^T)``, with the error ``E`` of the weight, the Gram ``H`` of the input, and the Gram
    ``G`` of the output in the original model.

    Options:
      by: ``logits``: ``G = E[g g^T]`` of the gradients ``g`` of the model's predictions at the
        output. This is the Fisher information, with which the divergence of the predictions grows
        (arXiv:1503.05671). It takes a forward and a backward pass over the calibration text, which
        also give the token weights of ``calibrate: {tokens: gradients}``. ``covariance``:
        ``G = E[y y^T]`` of the outputs ``y`` without bias, so that a direction counts by its
        energy. ``inverse_covariance``: ``G = E[y y^T]^-1``, so that all directions count alike
        relative to their energy.
      labels: the next token of the gradient of ``logits``: ``model`` draws it from the model's
        predictions, as the Fisher information asks; ``text`` takes the token of the text.
      samples: labels drawn for each token; each takes a backward pass.
      seed: of the draws.
      damping: fraction of the mean diagonal of ``G`` that is added to the diagonal. A larger
        fraction weighs outputs more alike. ``inverse_covariance`` adds it before inverting.
      precision: of the passes over the text, as in ``calibrate``.
    """

    name: ClassVar[str] = "calibrate_outputs"
    by: Literal["logits", "covariance", "inverse_covariance"] = "logits"
    labels: Literal["model", "text"] = "model"
    samples: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    precision: AskedPrecision = "auto"

    @override
    def survey(self, context: SurveyContext) -> dict[str, Any]:
        windows = context.windows
        if windows is None:
            raise PassError(self.name, "has no text: give 'calibration' in model.yaml")
        linears = {linear.name: linear for linear in context.linears if linear.block is not None}
        if not linears:
            raise PassError(self.name, "the model has no linear in a decoder block")
        take = self._of_gradients if self.by == "logits" else self._of_outputs
        found = context.remember("output_grams", lambda: take(context, linears), files=_FOLDER)
        if self.by == "logits" and (table := _token_embedding(context)) is not None:
            # Of the gradients at what enters the first block.
            table.output_gram = partial(self._damped_gram, context.folder, table.name)
        for linear in linears.values():
            linear.output_gram = self._gram_of(linear, linears, context.folder)
            if self.by == "logits":
                linear.token_weights = _token_weights_of(linear, context.folder)
        return {"by": self.by, "linears": len(linears), "tokens": windows.tokens, **found}

    @classmethod
    @override
    def summary(cls, found: Mapping[str, Any]) -> str:
        return f"by {found['by']}, {found['linears']} linears over {found['tokens']:,} tokens"

    def _of_gradients(
        self, context: SurveyContext, linears: Mapping[str, Linear]
    ) -> dict[str, Any]:
        table = _token_embedding(context)
        context.output_gradients(
            list(dict.fromkeys(_whole(linear) for linear in linears.values())),
            folder=context.folder / _FOLDER,
            labels=self.labels,
            draws=self.samples,
            seed=self.seed,
            precision=self.precision,
            embedding=None if table is None else table.name,
        )
        return {"labels": self.labels, "samples": self.samples, "seed": self.seed}

    def _of_outputs(self, context: SurveyContext, linears: Mapping[str, Linear]) -> dict[str, Any]:
        del linears
        calibrate = Calibrate(tokens="equal", precision=self.precision)
        for group in context.walk(self.name, calibrate):
            assert group.gram is not None  # noqa: S101 - walk() has taken it
            for linear in group.linears:
                if linear.block is not None:
                    weight = linear.weight().astype(np.float64)
                    mean = weight @ group.gram.matrix @ weight.T / max(group.gram.tokens, 1.0)
                    context.write_arrays(
                        f"{_FOLDER}/{linear.name}", {_GRAM: mean.astype(np.float32)}
                    )
        return {}

    def _gram_of(self, linear: Linear, linears: Mapping[str, Linear], folder: Path) -> OutputGram:
        """A function that loads the Gram of one linear's output."""
        whole = _whole(linear) if self.by == "logits" else linear.name

        # The output of `v` is the input of `u`.
        is_inner = linear.name == f"{whole}.v"
        return partial(
            self._damped_gram, folder, whole, linears[f"{whole}.u"] if is_inner else None
        )

    def _damped_gram(
        self, folder: Path, name: str, behind: Linear | None = None
    ) -> NDArray[np.float32]:
        """The Gram that is kept under ``name``, or that of the input of ``behind`` by it."""
        gram = _read(folder, name, _GRAM).astype(np.float64)
        if behind is not None:
            after = behind.weight().astype(np.float64)
            gram = after.T @ gram @ after
        return self._damped(gram).astype(np.float32)

    def _damped(self, gram: NDArray[np.float64]) -> NDArray[np.float64]:
        level = float(np.trace(gram)) / len(gram)
        if level == 0:  # nothing depends on the output, or it is always zero
            return np.eye(len(gram))
        damped: NDArray[np.float64] = gram + self.damping * level * np.eye(len(gram))
        if self.by == "inverse_covariance":
            return np.asarray(np.linalg.pinv(damped, hermitian=True), np.float64)
        return damped


def _token_weights_of(linear: Linear, folder: Path) -> Callable[[], NDArray[np.float32]]:
    return lambda: _read(folder, _whole(linear), "token_weights")


def _token_embedding(context: SurveyContext) -> Embedding | None:
    """The one table that tokens look up; None where there are several or none."""
    tables = [table for table in context.embeddings if table.of_tokens]
    return tables[0] if len(tables) == 1 else None


def _whole(linear: Linear) -> str:
    """Name of ``linear`` in the original model; of a factor, that of the whole weight."""
    return linear.name if linear.whole is None else linear.whole.name


def _read(folder: Path, name: str, tensor: str) -> NDArray[np.float32]:
    with safe_open(_file(folder, name), framework="numpy") as file:
        found: NDArray[np.float32] = file.get_tensor(tensor)
    return found


def _file(folder: Path, name: str) -> Path:
    return folder / _FOLDER / f"{name}.safetensors"
