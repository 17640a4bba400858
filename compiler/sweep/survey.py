"""The compiler's implementation of :class:`~eoracc.passes.survey.SurveyContext`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save_file

from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.eager.output_gradients import Labels, output_gradient_grams
from eoracc.compiler.kept.files import remove
from eoracc.compiler.kept.folder import KeptFolder
from eoracc.compiler.sweep.batch import Batch, make_batches
from eoracc.compiler.sweep.blank import compress_blank
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.forward import ForwardPass, one_thread
from eoracc.compiler.sweep.products import gram_products, resolve_precision
from eoracc.compiler.sweep.trials import SweepTrials
from eoracc.compiler.text.windows import Windows
from eoracc.errors import ConfigError
from eoracc.passes.base import LayerPass
from eoracc.passes.calibrate import AskedPrecision, Calibrate, Precision
from eoracc.passes.graph.embeddings import Embedding, find_embeddings
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.passes.progress import Progress
from eoracc.passes.recipe import Recipe

__all__ = ["FolderBytes", "Survey", "calibration_batches"]

FolderBytes = Callable[[ir.Model], int]
"""The bytes of the folder that a compressed graph will be written to."""

_BATCH = 4
"""Calibration windows per batch: enough to fill the cores, few enough to stay in cache."""


def calibration_batches(windows: Windows) -> list[Batch]:
    """The windows of a calibration text in batches, graph inputs set."""
    return make_batches(
        windows.input_ids, windows.attention_mask, size=_BATCH, weights=windows.weights
    )


@dataclass(frozen=True, eq=False)
class Survey:
    """One survey's view of a build.

    Attributes:
      model: the graph; a survey leaves it as it is.
      linears: of the graph, in execution order.
      windows: the calibration text; None where model.yaml gives none.
      following: the layer passes of the next sweep, in order.
      checkpoint: the original model as a Hugging Face folder.
      trust_remote_code: let transformers run code that the checkpoint brings.
      folder: for results that took long; it lasts until the build succeeds.
      key: digest of everything that the results depend on.
      progress: shown a phase of the survey's own.
      embeddings: of the graph, in execution order.
      folder_bytes: the bytes of the folder that a compressed graph will be written to; None where
        none is written.
    """

    model: ir.Model
    linears: Sequence[Linear]
    windows: Windows | None
    following: Sequence[LayerPass]
    checkpoint: Path
    trust_remote_code: bool
    folder: Path
    key: str
    progress: Progress
    embeddings: Sequence[Embedding] = ()
    folder_bytes: FolderBytes | None = None

    def batches(self) -> list[Batch]:
        """The calibration windows with graph inputs set, fresh on every call; empty for no text."""
        return [] if self.windows is None else calibration_batches(self.windows)

    def executor(self, *, precision: Precision = "float32") -> Executor:
        """An executor of a copy of the graph, whose linears may be compressed on trial.

        The linears have the attributes of the graph's own: the weights that they are factors of,
        and the results of earlier surveys.

        Args:
          precision: of the forward pass.
        """
        copy = self.model.clone()
        return Executor(copy, self._linears_of(copy), precision=precision)

    def _linears_of(self, copy: ir.Model) -> list[Linear]:
        known = {linear.name: linear for linear in self.linears}
        linears = find_linears(copy)
        for linear in linears:
            own = known[linear.name]
            linear.whole, linear.plan = own.whole, dict(own.plan)
            linear.output_gram, linear.token_weights = own.output_gram, own.token_weights
        return linears

    def other_bytes(self, plans: Mapping[str, Mapping[str, Any]]) -> int:
        """See :meth:`.SurveyContext.other_bytes`."""
        if self.folder_bytes is None:
            raise ConfigError("'size' is a budget of the folder that 'eoracc build' writes")
        copy = self.model.clone()
        linears, embeddings = self._linears_of(copy), find_embeddings(copy)
        for linear in linears:
            linear.plan |= plans.get(linear.name, {})
        for table in embeddings:
            table.plan |= plans.get(table.name, {})
        compress_blank(self.following, copy, linears, embeddings)
        planned = [linear for linear in linears if linear.name in plans]
        weights = [linear.compressed for linear in planned]
        weights += [table.compressed for table in embeddings if table.name in plans]
        factors = [linear.factors for linear in planned]
        # A set of objects: a head may share the weight of its embedding.
        stored = {part for part in (*weights, *factors) if part is not None}
        return self.folder_bytes(copy) - sum(part.nbytes for part in stored)

    def walk(self, name: str, calibrate: Calibrate) -> Iterator[LinearGroup]:
        """See :meth:`.SurveyContext.walk`."""
        calibrate = replace(calibrate, through="original", match="weights")
        executor = self.executor(precision=resolve_precision(calibrate.precision))
        forward = ForwardPass(executor, self.batches(), Linear.weight, match="weights")
        forward.start()
        with self.progress.phase(name, len(executor.levels)) as phase:
            for level, groups in enumerate(executor.levels):
                for group in groups:
                    forward.show(group)
                    calibrate.call(group)
                    with one_thread():
                        yield group
                    group.forget_inputs()
                if level < executor.head_level:
                    forward.step(level)
                phase.advance(groups[0].name)

    def each_group(
        self, name: str, calibrate: Calibrate, make: Callable[[LinearGroup], list[Any]]
    ) -> list[Any]:
        """See :meth:`.SurveyContext.each_group`."""
        results: list[Any] = []
        for index, group in enumerate(self.walk(name, calibrate)):
            results += self.remember(f"{name}.{index}", partial(_as_found, make, group))["found"]
        return results

    def remember(
        self, name: str, make: Callable[[], dict[str, Any]], *, files: str = ""
    ) -> dict[str, Any]:
        """See :meth:`.SurveyContext.remember`."""
        kept = KeptFolder(self.folder, self.key)
        record = f"{name}.json"
        content = kept.read(record)
        if content is not None:
            if kept.holds(content["files"]):
                found: dict[str, Any] = content["found"]
                return found
            remove(self.folder / files)
        if files and not (self.folder / files).is_dir():
            remove(self.folder / files)
        found = make()
        arrays = sorted((self.folder / files).glob("*.safetensors")) if files else []
        sealed = kept.seal(path.relative_to(self.folder).as_posix() for path in arrays)
        kept.write(record, {"found": found, "files": sealed})
        return found

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """See :meth:`.SurveyContext.write_arrays`."""
        kept = KeptFolder(self.folder, self.key)
        kept.put(f"{name}.safetensors", lambda path: save_file(dict(arrays), path))

    def trials(self, option: str, *, probes: Collection[int], resume: Iterable[int]) -> SweepTrials:
        """See :meth:`.SurveyContext.trials`."""
        calibrate = Recipe(self.following).calibrate
        precision = "float32" if calibrate is None else resolve_precision(calibrate.precision)
        return SweepTrials(
            Executor(self.model, self.linears, precision=precision),
            self.following,
            self.batches,
            option,
            folder=self.folder / "activations",
            probes=probes,
            resume=resume,
        )

    def output_gradients(
        self,
        names: Sequence[str],
        *,
        folder: Path,
        labels: Labels,
        draws: int,
        seed: int,
        precision: AskedPrecision,
        embedding: str | None = None,
    ) -> None:
        """See :meth:`.SurveyContext.output_gradients`."""
        assert self.windows is not None  # noqa: S101 - the survey has checked
        resolved = resolve_precision(precision)
        products = gram_products(resolved)
        output_gradient_grams(
            load_eager(self.checkpoint, {}, trust_remote_code=self.trust_remote_code),
            names,
            self.windows,
            folder=folder,
            key=self.key,
            labels=labels,
            draws=draws,
            seed=seed,
            precision=resolved,
            add=None if products is None else products.outer,
            progress=self.progress,
            embedding=embedding,
        )


def _as_found(make: Callable[[LinearGroup], list[Any]], group: LinearGroup) -> dict[str, Any]:
    return {"found": make(group)}
