"""The flow of ``eoracc compare``: compress one model by several methods, score all on one text.

    model.yaml -> load, tokenize, score the original -> per contender: passes, score -> rows

A contender's passes run as in a build (:func:`eoracc.compiler.sweep.pipeline.compress`), except
that no factors are dropped on held-out text: the figures are those of the method itself. A folder
beside the output caches finished rows by a digest of everything that they depend on, and the saved
state of the current sweep.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc import __version__
from eoracc.compiler.chat.ship import ChatTemplates, ship_chat
from eoracc.compiler.compare.folder import WorkFolder
from eoracc.compiler.compare.methods import Method, find_methods
from eoracc.compiler.compare.plan import BudgetProblem, BuildBytes, Contender, Fit, fit
from eoracc.compiler.compare.planned_bytes import PLAIN_BYTES, stored_bytes
from eoracc.compiler.compare.result import Comparison, Figures, Original, Row, Through
from eoracc.compiler.compare.shared_sweep import Sharing, seconds_spent, sweep_together
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.frontend_check.check import check_frontend
from eoracc.compiler.kept.files import remove
from eoracc.compiler.observe.spans import cpu_seconds
from eoracc.compiler.report.fidelity import Scorer, Variant
from eoracc.compiler.sweep.blank import compress_blank
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import compress
from eoracc.compiler.targets.output_place import refuse_full_disk
from eoracc.compiler.targets.planned_folder import PlannedFolder
from eoracc.compiler.targets.tokens import ship_tokenizer
from eoracc.compiler.text.sources import read_documents
from eoracc.compiler.text.windows import (
    Settings,
    Windows,
    calibration_windows,
    evaluation_windows,
)
from eoracc.errors import ConfigError, ModelError, PassError
from eoracc.passes.base import ModelPass, Pass
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph import spec
from eoracc.passes.graph.counted import counted
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.progress import Phase, Progress
from eoracc.printable import quoted
from eoracc.runtime.memory import release_memory

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["compare", "work_folder"]


_HELD_OUT, _OOD = "", "_ood"
"""Texts, named by the suffix of their figures."""

_OOD_SETTINGS = Settings(
    windows="compare.ood.windows",
    offset="compare.ood.offset_tokens",
    window_length="compare.ood.window_length",
)

_KEY_DIGITS = 32
"""Length of a digest in file names."""

_LABEL = 20
"""Length of a method's name in the progress display."""


def work_folder(config: BuildConfig, config_dir: Path) -> Path:
    """The folder that caches finished rows and saved states."""
    output = config.output_path(config_dir)
    return output.with_name(f".{output.name}.compare")


def compare(
    config: BuildConfig,
    methods: Sequence[str],
    budgets: Sequence[str],
    *,
    config_dir: Path,
    progress: Progress,
    fresh: bool = False,
) -> Comparison:
    """Try every method at every budget.

    Args:
      config: from model.yaml.
      methods: names; see :func:`~eoracc.compiler.compare.methods.find_methods`.
      budgets: as :func:`~eoracc.compiler.config.budget.parse_budget` gives them.
      config_dir: what relative paths in ``config`` are relative to.
      progress: shown the phases.
      fresh: delete the results of earlier runs.

    Raises:
      EoraccError: bad input, or no budget can be met; in one sentence.
    """
    known = find_methods(config, methods)
    if not known:
        raise ConfigError(
            "there are no methods to compare: give --methods none,svd,eora, or "
            "'compare: {methods: …}' in model.yaml"
        )
    if not budgets and any(method.takes_budget for method in known):
        raise ConfigError(
            "there are no budgets to compare at: give --budgets 3.5,4 (bits per weight) or 30% (of "
            "16 bits removed), or 'compare: {budgets: …}' in model.yaml"
        )
    if config.compressed is not None:
        raise ConfigError(
            "compressed: methods are compared on weights that the build itself compresses: score "
            "other compensations of a checkpoint with 'verify: {compare: …}' in 'eoracc build'"
        )
    work = WorkFolder(work_folder(config, config_dir))
    try:
        with work.claimed(fresh=fresh), TemporaryDirectory(dir=work.path) as shipped:
            comparing = _Comparing(config, config_dir, work, Path(shipped), progress)
            return comparing.run(known, list(dict.fromkeys(budgets)))
    except Exception as error:
        refuse_full_disk(work.path, error)
        raise


class _Comparing:
    """One run of ``compare``, with the model and texts that all contenders share."""

    def __init__(
        self,
        config: BuildConfig,
        config_dir: Path,
        work: WorkFolder,
        shipped: Path,
        progress: Progress,
    ) -> None:
        """Load the model and the texts.

        Args:
          config: from model.yaml.
          config_dir: what its relative paths are relative to.
          work: for what is kept.
          shipped: an empty folder for the files that are the same in the artifact of every row.
          progress: shown the phases.
        """
        self._config, self._work, self._progress = config, work, progress
        self._shipped = shipped
        with progress.phase("load", 1) as phase:
            self._loaded = load(
                config.model_source(config_dir),
                work=work.path,
                trust_remote_code=config.trust_remote_code,
            )
            phase.advance()
        spec.check(self._loaded.model, spec.Stage.FRONTEND, after="the frontend")
        check_frontend(self._loaded, progress)
        tokenizer, limits = self._loaded.tokenizer(), self._loaded.limits()
        self._texts: dict[str, Windows] = {
            _HELD_OUT: evaluation_windows(
                config.calibration, config.verify, tokenizer, config_dir=config_dir, limits=limits
            )
        }
        ood = None if config.compare is None else config.compare.ood
        if ood is not None:
            self._texts[_OOD] = evaluation_windows(
                None,
                ood,
                tokenizer,
                config_dir=config_dir,
                limits=limits,
                settings=_OOD_SETTINGS,
            )
        self._calibration = (
            None
            if config.calibration is None
            else calibration_windows(
                config.calibration, config.verify, tokenizer, config_dir=config_dir, limits=limits
            )
        )
        held_out = config.verify.held_out_text(config.calibration)
        ship_tokenizer(
            self._loaded,
            tokenizer,
            shipped,
            held_out=read_documents(
                held_out, tokenizer, config_dir, split_text=False, separator=""
            ),
        )
        ship_chat(ChatTemplates.of(tokenizer), shipped, genai="onnxruntime" in config.targets)
        release_memory()

    def run(self, methods: Sequence[Method], budgets: Sequence[str]) -> Comparison:
        """Compute every row that is not cached."""
        linears = _Linears(self._loaded, methods)
        contenders = [
            contender
            for method in methods
            for contender in _contenders(
                method, budgets, linears, partial(self._folder_bytes, linears)
            )
        ]
        if all(contender.fit is None for contender in contenders):
            first = contenders[0]
            raise ConfigError(
                f"no budget can be kept: method {quoted(first.method.name)} at {first.budget}: "
                f"{first.problem}"
            )
        fits = [contender.fit for contender in contenders if contender.fit is not None]
        shared_s = self._sweep_together(fits)
        scorers: dict[str, Scorer] = {}
        original = self._original(linears, scorers)
        rows = [
            self._row(contender, f"{place}/{len(contenders)}", linears, scorers)
            for place, contender in enumerate(contenders, 1)
        ]
        remove(self._work.surveys)
        if all(row.figures is None for row in rows):
            failed = next(
                row for row, contender in zip(rows, contenders, strict=True) if contender.fit
            )
            raise ConfigError(
                f"no method can do it here: {quoted(failed.method)}: {failed.skipped}"
            )
        held_out = self._texts[_HELD_OUT]
        return Comparison(
            model=self._config.model,
            digest=self._loaded.digest,
            through=_through(fits),
            calibration_tokens=0 if self._calibration is None else self._calibration.tokens,
            windows=len(held_out.input_ids),
            window_length=held_out.input_ids.shape[1],
            shared_s=shared_s,
            original=original,
            rows=rows,
        )

    def _planned_folder(self, passes: Sequence[Pass]) -> PlannedFolder:
        """The folder that a build with ``passes`` would write."""
        config = self._config.model_copy(update={"passes": tuple(passes)})
        return PlannedFolder(config, self._loaded, self._shipped)

    def _folder_bytes(self, linears: _Linears, passes: Sequence[Pass]) -> int:
        """Bytes of that folder, without the decisions of surveys."""
        copy = linears.graph(passes).clone()
        compress_blank(passes, copy, find_linears(copy), find_embeddings(copy))
        return self._planned_folder(passes).nbytes(copy)

    def _sweep_together(self, fits: Sequence[Fit]) -> float:
        """Run the sweeps that rows without cached figures can share.

        Returns:
          Seconds of processor time.
        """
        pending = {}
        for chosen in fits:
            variant = self._variant(chosen)
            key = self._key(variant)
            if self._cached(key) is None:
                pending[key] = Sharing(variant, self._work.sweeps(key))
        return sweep_together(
            list(pending.values()),
            self._loaded,
            self._calibration,
            self._work.shared,
            self._progress,
        )

    def _cached(self, key: str) -> Figures | None:
        kept = self._work.figures(key, Figures.__dataclass_fields__)
        return None if kept is None else Figures(**kept)

    def _row(
        self, contender: Contender, place: str, linears: _Linears, scorers: dict[str, Scorer]
    ) -> Row:
        """The row of ``contender``, from the cache if an earlier run has finished it."""
        method, chosen = contender.method, contender.fit
        row = Row(
            method=method.name,
            family=method.family,
            budget=contender.budget,
            skipped=contender.problem,
        )
        if chosen is None:
            return row
        variant = self._variant(chosen)
        row = replace(
            row, rank=chosen.rank, ratio=chosen.ratio, passes=variant.resolved()["passes"]
        )
        key = self._key(variant)
        figures = self._cached(key)
        if figures is not None:
            return replace(row, figures=figures)
        label = f"{place} {_short(method.name)} {contender.budget or ''}".rstrip()
        try:
            figures = self._measure(
                variant, key, _Labelled(self._progress, label), linears, scorers
            )
        except PassError as error:
            # The other methods may still succeed.
            return replace(row, skipped=str(error))
        self._work.keep(key, asdict(figures))
        return replace(row, figures=figures)

    def _variant(self, chosen: Fit) -> BuildConfig:
        """The build of the contender."""
        verify = self._config.verify.model_copy(update={"compare": ()})
        return self._config.model_copy(update={"passes": chosen.passes, "verify": verify})

    def _measure(
        self,
        variant: BuildConfig,
        key: str,
        progress: Progress,
        linears: _Linears,
        scorers: dict[str, Scorer],
    ) -> Figures:
        begun_s, begun_cpu_s = time.perf_counter(), cpu_seconds()
        compressed = compress(
            variant,
            replace(self._loaded, model=self._loaded.model.clone()),
            self._calibration if variant.recipe.reads_text else None,
            self._work.sweeps(key),
            progress,
            folder_bytes=self._planned_folder(variant.passes).nbytes,
            surveys=self._work.surveys,
        )
        wall_s, seconds = time.perf_counter() - begun_s, cpu_seconds() - begun_cpu_s
        executor = Executor(compressed.model, compressed.linears)
        scores = {}
        with progress.phase("score", len(self._texts)) as phase:
            for name, windows in self._texts.items():
                scorer = self._scorer(name, windows, scorers)
                with np.errstate(all="ignore"):  # checked below
                    scores[name] = scorer.score(Variant(executor, Linear.effective_weight))
                if not math.isfinite(scores[name].perplexity + scores[name].kl):
                    raise PassError("the compressed model", "predicts values that are not finite")
                phase.advance()
        nbytes = stored_bytes(counted(compressed.linears))
        release_memory()
        ood = scores.get(_OOD)
        return Figures(
            perplexity=scores[_HELD_OUT].perplexity,
            perplexity_ood=None if ood is None else ood.perplexity,
            kl=scores[_HELD_OUT].kl,
            kl_ood=None if ood is None else ood.kl,
            top1_agreement=scores[_HELD_OUT].top1_agreement,
            bytes=executor.parameter_bytes,
            folder_bytes=self._planned_folder(variant.passes).nbytes(compressed.model),
            linear_bytes=nbytes,
            bits_per_weight=8 * nbytes / linears.weights,
            seconds=seconds + seconds_spent(self._work.sweeps(key)),
            wall_s=wall_s,
        )

    def _original(self, linears: _Linears, scorers: dict[str, Scorer]) -> Original:
        """Figures of the original model, from the cache if an earlier run has finished them."""
        key = self._key(None)
        names = Original.__dataclass_fields__.keys() - {"linear_bytes"}
        kept = self._work.figures(key, names)
        if kept is not None:
            return Original(**kept, linear_bytes=linears.plain_bytes)
        found: dict[str, Any] = {"bytes": self._executor.parameter_bytes}
        with self._progress.phase("original", len(self._texts)) as phase:
            for name, windows in self._texts.items():
                with np.errstate(all="ignore"):
                    scores = self._scorer(name, windows, scorers).original()
                if not math.isfinite(scores.perplexity):
                    raise ModelError(
                        f"{self._config.model}: predicts values that are not finite: there is "
                        "nothing to compare with"
                    )
                found[f"perplexity{name}"] = scores.perplexity
                phase.advance()
        found.setdefault(f"perplexity{_OOD}", None)
        self._work.keep(key, found)
        return Original(**found, linear_bytes=linears.plain_bytes)

    def _scorer(self, name: str, windows: Windows, scorers: dict[str, Scorer]) -> Scorer:
        # Created on demand: where all rows are cached, the model does not run at all.
        if name not in scorers:
            scorers[name] = Scorer(self._executor, windows)
        return scorers[name]

    @cached_property
    def _executor(self) -> Executor:
        return Executor(self._loaded.model.clone())

    def _key(self, variant: BuildConfig | None) -> str:
        """Digest of everything that the figures of a variant, or of the original, depend on."""
        content: list[Any] = [__version__, self._loaded.digest, sorted(self._texts)]
        if variant is not None:
            folder = self._planned_folder(variant.passes).conditions()
            content += [variant.resolved()["passes"], folder]
        digest = hashlib.sha256(json.dumps(content).encode())
        texts = [*self._texts.values(), *([] if variant is None else [self._calibration])]
        for windows in texts:
            if windows is None:
                continue
            for array in (windows.input_ids, windows.attention_mask, windows.weights):
                digest.update(b"" if array is None else array.tobytes())
        return digest.hexdigest()[:_KEY_DIGITS]


class _Linears:
    """The linears that budgets and bytes count: those of decoder blocks.

    A linear that some of the methods skip counts with its plain size there, so that all methods are
    comparable.
    """

    def __init__(self, loaded: LoadedModel, methods: Sequence[Method]) -> None:
        self._views: dict[str, tuple[ir.Model, list[Linear]]] = {}
        self._loaded = loaded
        first = self.of(methods[0])
        self.weights = sum(linear.out_features * linear.in_features for linear in first)
        self.plain_bytes = PLAIN_BYTES * self.weights

    def of(self, method: Method) -> list[Linear]:
        """The counted linears before the method's first sweep."""
        return counted(self._view(method.passes)[1])

    def graph(self, passes: Sequence[Pass]) -> ir.Model:
        """The graph before the first sweep of ``passes``."""
        return self._view(passes)[0]

    def _view(self, passes: Sequence[Pass]) -> tuple[ir.Model, list[Linear]]:
        changes = [item for item in passes if isinstance(item, ModelPass)]
        key = repr(changes)
        if key not in self._views:
            model = self._loaded.model.clone()
            for item in changes:
                item.call(model)
            self._views[key] = model, find_linears(model)
        return self._views[key]


class _Labelled:
    """Progress that puts a label before the name of each phase."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label

    def phase(self, name: str, total: int) -> AbstractContextManager[Phase]:
        """See :meth:`Progress.phase`."""
        return self._progress.phase(f"{self._label}: {name}", total)


def _contenders(
    method: Method, budgets: Sequence[str], linears: _Linears, folder_bytes: BuildBytes
) -> list[Contender]:
    if not method.takes_budget:
        return [Contender(method, None, Fit(method.passes))]
    contenders = []
    for budget in budgets:
        try:
            chosen = fit(method, budget, linears.of(method), folder_bytes)
            contenders.append(Contender(method, budget, chosen))
        except BudgetProblem as problem:
            contenders.append(Contender(method, budget, None, str(problem)))
    return contenders


def _short(name: str) -> str:
    """``name``, shortened to leave room on a line of progress."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1]}…"


def _through(fits: Sequence[Fit]) -> Through:
    """The weights that the statistics of all contenders are taken through."""
    through = {
        item.through for chosen in fits for item in chosen.passes if isinstance(item, Calibrate)
    }
    return through.pop() if len(through) == 1 else "both" if through else "compressed"
