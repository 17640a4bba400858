"""Solve one more adapter for a finished artifact, whose backbone stays as it is.

    artifact + original weights -> backbone -> solve -> score -> parity -> store

What takes long is kept in a work folder beside the artifact until the adapter is stored, so that an
interrupted solve goes on from there. The artifact changes at the very end, all at once.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from eoracc.compiler.adapters.gates import (
    ADAPTER_UNPROVEN,
    adapter_details,
    adapter_warnings,
    check_adapters,
    record_adapters,
    refuse_adapters,
    score_adapters,
)
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.adapters.solve import SolvedAdapter, load_task, solve_adapter
from eoracc.compiler.config.sections import AdapterConfig, BuildConfig
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.frontend_check.check import check_frontend
from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.observe.spans import cpu_seconds, warn
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.content import AdaptersReport, WarningReport
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.targets.output_place import refuse_full_disk
from eoracc.compiler.text.windows import Settings
from eoracc.errors import ArtifactError, GateError
from eoracc.passes.base import ModelPass
from eoracc.passes.calibrate import Calibrate
from eoracc.printable import quoted
from eoracc.runtime.adapters.adapter import Adapter, check_adapter_name
from eoracc.runtime.adapters.files import listed_adapters
from eoracc.runtime.adapters.slots import read_slots
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.manifest import Manifest, locked_artifact, opening
from eoracc.runtime.memory import release_memory
from eoracc.runtime.onnxruntime.native_library import NativeLibrary, choose_library

if TYPE_CHECKING:
    from eoracc.plugins.adapters import AdapterSlots

__all__ = ["AddedAdapter", "solve_for_artifact"]

_SETTINGS = Settings(
    samples="--samples",
    windows="--windows",
    offset="--held-out-offset",
    length="--sequence-length",
    window_length="--sequence-length",
)


@dataclass(frozen=True)
class AddedAdapter:
    """An adapter that was solved and stored.

    Attributes:
      adapter: as it is in the artifact.
      report: the figures that went into the artifact's report.
      manifest: of the artifact as it is now.
      wall_s: seconds on the clock.
      cpu_s: seconds of processor time.
    """

    adapter: Adapter
    report: AdaptersReport
    manifest: Manifest
    wall_s: float
    cpu_s: float

    @property
    def warnings(self) -> list[WarningReport]:
        """What the user of the adapter should know; the artifact's report has them too."""
        return adapter_warnings(self.report.parity)


@dataclass(frozen=True)
class _Request:
    """A checked request to add an adapter to an artifact.

    Attributes:
      manifest: of the artifact, verified.
      config: of its build.
      slots: of its model for adapters.
      library: that runs its model.
    """

    manifest: Manifest
    config: BuildConfig
    slots: AdapterSlots
    library: NativeLibrary | None


def _check_request(
    folder: Path,
    name: str,
    config: AdapterConfig,
    *,
    force: bool,
    trust_remote_code: bool,
    trust: bool,
    authenticity: Authenticity,
) -> _Request:
    """Check that an adapter can be added, before any work is done for it.

    Args:
      folder: the artifact; every byte of it is compared with its manifest.
      name: of the adapter.
      config: of the adapter.
      force: replace an adapter of that name.
      trust_remote_code: what the command line says; the artifact's manifest cannot allow it.
      trust: let the artifact's own native library run.
      authenticity: what the artifact has to be.

    Raises:
      ArtifactError: the artifact is damaged, takes no adapters or none of that type, has one of
        that name, or needs code that the command line does not allow.
    """
    check_adapter_name(name)
    with opening(folder, authenticity) as manifest:
        slots = read_slots(folder, manifest)
        library = choose_library(folder, manifest, trust=trust)
    if name in listed_adapters(manifest) and not force:
        raise ArtifactError(
            f"{folder}: has an adapter '{name}': choose another name, or replace it with --force"
        )
    if config.factor_type not in slots.factor_types:
        raise ArtifactError(
            f"{folder}: takes adapters of {' or '.join(slots.factor_types)} factors, not "
            f"{config.factor_type}: choose another --factor-type"
        )
    try:
        built = BuildConfig.model_validate(dict(manifest.config))
    except ValidationError:
        raise ArtifactError(
            f"{folder}: its manifest holds no configuration that this eoracc knows: "
            "build the artifact again"
        ) from None
    if built.trust_remote_code and not trust_remote_code:
        raise ArtifactError(
            f"{folder}: its model, {quoted(built.model)}, needs Python code of its own "
            "repository, which "
            "an artifact cannot allow to run: add --trust-remote-code if you trust it"
        )
    return _Request(manifest, built, slots, library)


def solve_for_artifact(
    folder: Path,
    name: str,
    config: AdapterConfig,
    *,
    data_dir: Path,
    progress: SilentProgress,
    model: str | None = None,
    trust_remote_code: bool = False,
    trust: bool = False,
    authenticity: Authenticity = UNCHECKED,
    force: bool = False,
    parity: bool = True,
) -> AddedAdapter:
    """Solve an adapter against the backbone of an artifact, and store it there.

    Args:
      folder: the artifact.
      name: of the adapter.
      config: its texts, rank and factor type.
      data_dir: the folder that relative paths of texts are relative to.
      progress: shown the phases.
      model: source of the original weights; None for the one in the manifest.
      trust_remote_code: let transformers run code that this source brings.
      trust: execute the artifact's own native library where it differs from the installed one.
      authenticity: what the artifact has to be at the beginning.
      force: replace an adapter of that name.
      parity: whether to compare the artifact with the adapter to eager PyTorch.

    Raises:
      EoraccError: bad input, in one sentence; the artifact is unchanged.
      GateError: the artifact computes the adapter wrongly; it is not stored.
    """
    begun_s, begun_cpu_s = time.perf_counter(), cpu_seconds()
    request = _check_request(
        folder,
        name,
        config,
        force=force,
        trust_remote_code=trust_remote_code,
        trust=trust,
        authenticity=authenticity,
    )
    # Of this adapter alone: others may be solved at the same time.
    work = folder.absolute().with_name(f".{folder.absolute().name}.{name}.work")
    with claimed(work, f"run that adds '{name}'", otherwise="give the adapter another name"):
        try:
            solved, report = _solve(
                folder,
                name,
                config,
                request,
                work,
                data_dir,
                progress,
                model,
                trust_remote_code=trust_remote_code,
                parity=parity,
            )
        except Exception as error:
            refuse_full_disk(folder, error)
            raise
        adapter = Adapter(
            name, solved.factors, request.manifest.digest, adapter_details(solved, report)
        )
        manifest = add_adapter(
            folder, adapter, force=force, edit_report=lambda stored: _merge(stored, report)
        )
        shutil.rmtree(work, ignore_errors=True)
    return AddedAdapter(
        adapter,
        report,
        manifest,
        wall_s=time.perf_counter() - begun_s,
        cpu_s=cpu_seconds() - begun_cpu_s,
    )


def _solve(
    folder: Path,
    name: str,
    config: AdapterConfig,
    request: _Request,
    work: Path,
    data_dir: Path,
    progress: SilentProgress,
    model: str | None,
    *,
    trust_remote_code: bool,
    parity: bool,
) -> tuple[SolvedAdapter, AdaptersReport]:
    """Solve and score; check against PyTorch."""
    with progress.phase("load", 1) as phase:
        loaded = _original(folder, request, model, work, trust_remote_code=trust_remote_code)
        phase.advance()
    check_frontend(loaded, progress)
    release_memory()
    with progress.phase("restore", 1) as phase:
        task = load_task(
            name,
            config,
            loaded.tokenizer(),
            config_dir=data_dir,
            limits=loaded.limits(),
            settings=_SETTINGS,
        )
        original = Executor(loaded.model.clone())
        for item in request.config.passes:
            if isinstance(item, ModelPass):
                item.call(loaded.model)
        with locked_artifact(folder, request.manifest.digest):
            backbone = restore_backbone(folder, loaded.model)
        phase.advance()
    calibrate = request.config.recipe.last_calibrate or Calibrate()
    solved = solve_adapter(
        backbone, task, work=work / "sweep", progress=progress, calibrate=calibrate
    )
    report = score_adapters(original, backbone, [solved], progress=progress)
    if parity:
        report = _check(folder, request, loaded, backbone, solved, report, progress)
    return solved, report


def _original(
    folder: Path, request: _Request, model: str | None, work: Path, *, trust_remote_code: bool
) -> LoadedModel:
    """The checkpoint that the artifact was built from.

    Raises:
      ArtifactError: it cannot be found, or is another one.
    """
    named = request.manifest.source.get("model", "")
    source = model or named
    where = Path(source).expanduser()
    is_hub_id = where.suffix != ".gguf" and named.partition("@")[0].count("/") == 1
    if model is None and not where.exists() and not is_hub_id:
        raise ArtifactError(
            f"{folder}: was built from {quoted(named)}, which is not to be found from here: "
            "say where the original weights are with --model"
        )
    loaded = load(source, work=work, trust_remote_code=trust_remote_code)
    digest = request.manifest.source.get("digest")
    if loaded.digest != digest:
        raise ArtifactError(
            f"{source}: has digest {loaded.digest[:12]}, the artifact was built from "
            f"{str(digest)[:12]}: give the original weights with --model"
        )
    return loaded


def _check(
    folder: Path,
    request: _Request,
    loaded: LoadedModel,
    backbone: Backbone,
    solved: SolvedAdapter,
    report: AdaptersReport,
    progress: SilentProgress,
) -> AdaptersReport:
    release_memory()
    cases = record_adapters(
        backbone,
        [solved],
        folder=loaded.folder,
        accuracy_level=request.config.onnxruntime.accuracy_level,
        trust_remote_code=loaded.trust_remote_code,
        progress=progress,
    )
    name = solved.task.name
    with locked_artifact(folder, request.manifest.digest):
        parity = check_adapters(
            folder,
            request.slots,
            {name: solved.factors},
            cases,
            library=True if request.library is None else request.library.path,
            progress=progress,
        )
    for problem in refuse_adapters(parity):
        raise GateError(f"{problem}: it was not stored")
    for warning in adapter_warnings(parity):
        warn(warning.code, warning.message, warning.linear, warning.figures)
    return replace(report, parity=parity)


def _merge(stored: dict[str, Any], report: AdaptersReport) -> None:
    """Put the figures of a new adapter among those of report.json."""
    section = stored.setdefault("adapters", asdict(AdaptersReport()))
    for part, figures in asdict(report).items():
        section.setdefault(part, {}).update(figures)
    # From all that is stored: a replaced adapter's warning goes with its figures.
    unproven = adapter_warnings(AdaptersReport.from_dict(section).parity)
    others = [one for one in stored.get("warnings", []) if one["code"] != ADAPTER_UNPROVEN]
    stored["warnings"] = [*others, *map(asdict, unproven)]
