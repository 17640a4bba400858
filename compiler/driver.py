"""The flow of a build, top to bottom.

    model.yaml -> load -> check -> passes -> adapters -> fidelity gate -> each target: lower, write
               -> parity gate -> artifact

Slow results (a converted GGUF, the finished blocks of a sweep) are kept in a work folder
beside the output until the build succeeds: an interrupted build resumes from there, and what a
power loss or the disk has damaged is computed again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eoracc.compiler.adapters.gates import (
    adapter_details,
    adapter_warnings,
    check_adapters,
    compare_compensations,
    record_adapters,
    refuse_adapters,
    score_adapters,
)
from eoracc.compiler.adapters.solve import SolvedAdapter, Task, solve_adapter
from eoracc.compiler.chat.ship import ship_chat
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.context import context_notes
from eoracc.compiler.inputs import Inputs, read_inputs
from eoracc.compiler.kept.claim import claimed
from eoracc.compiler.kept.files import replace_file
from eoracc.compiler.observe.spans import cpu_seconds, warn
from eoracc.compiler.progress import PhaseTime, SilentProgress
from eoracc.compiler.report.content import (
    AdaptersReport,
    BuildReport,
    FactorizedReport,
    FidelityReport,
    LinearReport,
    Report,
    WarningReport,
)
from eoracc.compiler.report.gates import fidelity_report
from eoracc.compiler.report.linears import (
    factorized_reports,
    linear_report,
    linear_warnings,
    padding_warnings,
)
from eoracc.compiler.report.lines import parity_line
from eoracc.compiler.stage_graphs import StageGraphs
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import Compressed, compress
from eoracc.compiler.sweep.products import resolve_precision
from eoracc.compiler.targets.artifact import ArtifactWriter
from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.machine import build_machine
from eoracc.compiler.targets.output_place import check_output, refuse_full_disk
from eoracc.compiler.targets.parity_record import AdapterCases
from eoracc.compiler.targets.planned_folder import PlannedFolder
from eoracc.compiler.targets.registry import TARGETS
from eoracc.compiler.targets.tokens import tokenizer_report
from eoracc.compiler.text.windows import (
    Windows,
)
from eoracc.documents import Reader
from eoracc.errors import ArtifactError, EoraccError, GateError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.graph.linears import Linear
from eoracc.passes.plan.calibrate_outputs import CalibrateOutputs
from eoracc.passes.progress import Progress
from eoracc.plugins.adapters import AdapterSlots
from eoracc.runtime.artifact.manifest import Manifest
from eoracc.runtime.memory import peak_bytes, release_memory, resident_bytes
from eoracc.runtime.parity.report import ParityReport

__all__ = ["BuildResult", "build"]

_PARITY_CHECK = Reader(ArtifactError, "build again")


_READ_TEXT = (Calibrate, CalibrateOutputs)
"""Passes over the calibration text, in a precision of their own."""


@dataclass(frozen=True)
class BuildResult:
    """A finished build.

    Attributes:
      output: the artifact's folder.
      manifest: its manifest.
      report: its report.
    """

    output: Path
    manifest: Manifest
    report: Report


def build(
    config: BuildConfig,
    *,
    config_dir: Path,
    progress: SilentProgress,
    force: bool = False,
    keep_graphs: Path | None = None,
    lean: bool = False,
    surveys: Path | None = None,
) -> BuildResult:
    """Build the artifact that ``config`` describes.

    Args:
      config: from model.yaml.
      config_dir: what its relative paths are relative to.
      progress: shown the phases, and asked for their times.
      force: replace an artifact that is there.
      keep_graphs: an empty or new folder for the graph of each stage; None keeps none.
      lean: leave out the records that only ``eoracc verify`` reads; the build still checks parity.
      surveys: a folder that keeps the results of surveys, for later builds that differ in the
        budget alone; None keeps them until the build succeeds.

    Raises:
      EoraccError: bad input, in one sentence; nothing is left half-written.
      GateError: parity or a fidelity limit failed; no artifact is written.
    """
    output = config.output_path(config_dir)
    check_output(output, force=force)
    graphs = StageGraphs(keep_graphs)
    try:
        with (
            nullcontext()
            if surveys is None
            else claimed(surveys, "build", otherwise="choose another folder for '--keep-surveys'")
        ):
            return _build(
                config,
                config_dir,
                output,
                progress,
                graphs,
                force=force,
                lean=lean,
                surveys=surveys,
            )
    except Exception as error:
        refuse_full_disk(output, error)
        raise


def _build(
    config: BuildConfig,
    config_dir: Path,
    output: Path,
    progress: SilentProgress,
    graphs: StageGraphs,
    *,
    force: bool,
    lean: bool,
    surveys: Path | None,
) -> BuildResult:
    begun_s, begun_cpu_s = time.perf_counter(), cpu_seconds()
    work = output.with_name(f".{output.name}.work")
    with ArtifactWriter(output, force=force) as writer, claimed(work, "build"):
        made = _make(config, config_dir, work, writer, progress, graphs, lean=lean, surveys=surveys)
        # The model and its weights are gone by now: checking needs the artifact alone.
        release_memory()
        parity, beside_bytes = (
            _check_parity(writer.folder, progress) if config.verify.parity else (None, 0)
        )
        adapters = _write_adapters(writer, made, progress)
        unproven = adapter_warnings(adapters.parity)
        _emit_warnings(unproven)
        as_built = _as_built(config, made)
        report = Report(
            fidelity=made.fidelity,
            parity={} if parity is None else parity.as_dict(),
            linears=made.linears,
            factorized=made.factorized,
            surveys=made.surveys,
            build=BuildReport(
                wall_s=time.perf_counter() - begun_s,
                cpu_s=cpu_seconds() - begun_cpu_s,
                peak_memory_bytes=max(peak_bytes(), beside_bytes),
                phases=[asdict(phase_time) for phase_time in progress.times],
                passes=[asdict(pass_time) for pass_time in made.times],
                precisions=_precisions(as_built),
            ),
            adapters=adapters,
            targets=made.targets,
            chat=made.chat,
            tokenizer=made.tokenizer,
            notes=made.notes,
            warnings=[*made.warnings, *unproven],
        )
        _check_gates(report, work)
        if lean:
            writer.leave_out_records()
        manifest = writer.commit(
            source={
                "model": config.model,
                "model_type": made.model_type,
                "digest": made.digest,
                **made.imported,
            },
            config=as_built.resolved(),
            parity=report.parity,
            machine=build_machine(),
            report=report,
            limit_bytes=config.recipe.folder_limit,
        )
        shutil.rmtree(work, ignore_errors=True)
    assert writer.report is not None  # noqa: S101 - it was given
    return BuildResult(output, manifest, writer.report)


def _as_built(config: BuildConfig, made: _Made) -> BuildConfig:
    """``config`` with what the build chose: precisions for ``auto``, the accuracy level."""
    passes = tuple(
        replace(item, precision=resolve_precision(item.precision))
        if isinstance(item, _READ_TEXT)
        else item
        for item in config.passes
    )
    options = config.onnxruntime
    if made.accuracy_level is not None:
        options = options.model_copy(update={"accuracy_level": made.accuracy_level})
    return config.model_copy(update={"passes": passes, "onnxruntime": options})


def _precisions(config: BuildConfig) -> list[str]:
    """Those of all passes over the calibration text, each once."""
    return list(
        dict.fromkeys(item.precision for item in config.passes if isinstance(item, _READ_TEXT))
    )


@dataclass(frozen=True)
class _Made:
    """The results of a build that outlive its model, which is freed before parity is checked.

    Attributes:
      model_type: of the checkpoint's configuration.
      digest: of the checkpoint.
      imported: source and digest of the compressed checkpoint that was taken over; empty for none.
      fidelity: scores on held-out text.
      linears: a report of each.
      factorized: a report of each weight that is now a product of two linears.
      surveys: the result of each.
      times: of the passes.
      adapters: the solved ones.
      scores: of the adapters.
      slots: where the model takes adapters; None where it takes none.
      accuracy_level: of the linears for ONNX Runtime; None without that target.
      cases: the outputs that parity expects by adapter; empty where parity is turned off.
      targets: the part of the report of each.
      chat: the part of the report on chat templates.
      tokenizer: its part of the report.
      notes: on the model, for the report.
      warnings: on the texts and on linears.
    """

    model_type: str
    digest: str
    imported: Mapping[str, str]
    fidelity: FidelityReport
    linears: list[LinearReport]
    factorized: list[FactorizedReport]
    surveys: list[dict[str, Any]]
    times: list[PhaseTime]
    adapters: list[SolvedAdapter]
    scores: AdaptersReport
    slots: AdapterSlots | None
    accuracy_level: Literal[0, 4] | None
    cases: Mapping[str, AdapterCases]
    targets: Mapping[str, Mapping[str, Any]]
    chat: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    notes: Sequence[str]
    warnings: Sequence[WarningReport]


def _make(
    config: BuildConfig,
    config_dir: Path,
    work: Path,
    writer: ArtifactWriter,
    progress: Progress,
    graphs: StageGraphs,
    *,
    lean: bool,
    surveys: Path | None,
) -> _Made:
    """Load, compress, solve adapters and write; what parity will be checked against is recorded."""
    for name in config.targets:
        TARGETS[name].require()
    inputs = read_inputs(config, config_dir, work, writer.folder, progress)
    chat = ship_chat(inputs.chat, writer.folder, genai="onnxruntime" in config.targets)
    graphs.keep("frontend", inputs.loaded.model)
    original = Executor(inputs.loaded.model.clone())
    compressed = compress(
        config,
        inputs.loaded,
        inputs.calibration,
        work / "sweep",
        progress,
        held_out=inputs.checking,
        graphs=graphs,
        folder_bytes=PlannedFolder(config, inputs.loaded, writer.folder, lean=lean).nbytes,
        surveys=surveys,
        imported=inputs.imported,
    )
    release_memory()
    solved = _solve(config, compressed, inputs.tasks, work / "adapters", progress)
    fidelity = _score(config, original, compressed, inputs.held_out, progress)
    scores = _score_adapters(config, original, compressed, solved, work / "alone", progress)
    job = Job(
        config=config,
        loaded=inputs.loaded,
        compressed=compressed,
        original=original,
        held_out=inputs.held_out,
        writer=writer,
        work=work,
        progress=progress,
        graphs=graphs,
    )
    emitted, cases = _emit(job, solved)
    late = [
        *padding_warnings(compressed.linears),
        *(warning for target in emitted.values() for warning in target.warnings),
    ]
    _emit_warnings(late)
    return _Made(
        model_type=inputs.loaded.config.model_type,
        digest=inputs.loaded.digest,
        imported=(
            {}
            if inputs.imported is None
            else {
                "compressed": str(config.compressed),
                "compressed_digest": inputs.imported.digest,
            }
        ),
        fidelity=fidelity,
        linears=[linear_report(linear) for linear in compressed.linears],
        factorized=factorized_reports(compressed.linears),
        surveys=compressed.surveys,
        times=compressed.times,
        adapters=solved,
        scores=scores,
        slots=next((target.slots for target in emitted.values()), None),
        accuracy_level=next(
            (one.accuracy_level for one in emitted.values() if one.accuracy_level is not None), None
        ),
        cases=cases,
        targets={name: target.report for name, target in emitted.items() if target.report},
        chat=chat,
        tokenizer=tokenizer_report(writer.folder, inputs.tokenizer, config.targets),
        notes=[
            *context_notes(inputs.loaded.config, inputs.loaded.model.metadata_props),
            *_unchecked(inputs, compressed),
        ],
        warnings=[
            *inputs.warnings,
            *linear_warnings(compressed.linears),
            *late,
        ],
    )


def _emit_warnings(warnings: Sequence[WarningReport]) -> None:
    for warning in warnings:
        warn(warning.code, warning.message, warning.linear, warning.figures)


def _unchecked(inputs: Inputs, compressed: Compressed) -> list[str]:
    """A note where held-out text was too short to check factors on."""
    compensated = any(linear.factors is not None for linear in compressed.linears)
    if inputs.calibration is None or inputs.checking is not None or not compensated:
        return []
    return ["factors were not checked on held-out text: it has no window beyond those of 'verify'."]


def _score(
    config: BuildConfig,
    original: Executor,
    compressed: Compressed,
    held_out: Windows,
    progress: Progress,
) -> FidelityReport:
    """Measure the compressed model against the original on held-out text."""
    compensations = [item.name for item in config.recipe.compensations]
    factorization = config.recipe.factorization
    return fidelity_report(
        original,
        Executor(compressed.model, compressed.linears),
        held_out,
        shipped=" + ".join(compensations) or None,
        factorized=None if factorization is None else factorization.name,
        pruned=config.recipe.pruning is not None,
        comparisons=compressed.comparisons,
        limits=config.verify.limits,
        progress=progress,
    )


def _emit(
    job: Job, solved: Sequence[SolvedAdapter]
) -> tuple[dict[str, Emitted], Mapping[str, AdapterCases]]:
    """Write every target; record what the model must compute with each adapter."""
    config = job.config
    emitted: dict[str, Emitted] = {name: TARGETS[name].emit(job) for name in config.targets}
    if not (config.verify.parity and solved and "onnxruntime" in emitted):
        return emitted, {}
    cases = record_adapters(
        job.compressed,
        solved,
        folder=job.loaded.folder,
        accuracy_level=emitted["onnxruntime"].accuracy_level or 0,
        trust_remote_code=job.loaded.trust_remote_code,
        progress=job.progress,
    )
    return emitted, cases


# --- adapters -------------------------------------------------------------------------------------


def _solve(
    config: BuildConfig,
    backbone: Backbone,
    tasks: Sequence[Task],
    folder: Path,
    progress: Progress,
    **options: Any,  # noqa: ANN401 - of solve_adapter
) -> list[SolvedAdapter]:
    calibrate = config.recipe.last_calibrate or Calibrate()
    return [
        solve_adapter(
            backbone,
            task,
            work=folder / task.name,
            progress=progress,
            calibrate=calibrate,
            **options,
        )
        for task in tasks
    ]


def _score_adapters(
    config: BuildConfig,
    original: Executor,
    backbone: Backbone,
    solved: Sequence[SolvedAdapter],
    folder: Path,
    progress: Progress,
) -> AdaptersReport:
    if not solved:
        return AdaptersReport()
    scores = score_adapters(original, backbone, solved, progress=progress)
    if not config.verify.compare_adapters:
        return scores
    alone = _solve(
        config,
        backbone,
        [adapter.task for adapter in solved],
        folder,
        progress,
        weight_of=Linear.backbone_weight,
        label="alone",
    )
    return compare_compensations(scores, backbone, solved, alone, progress=progress)


def _write_adapters(writer: ArtifactWriter, made: _Made, progress: Progress) -> AdaptersReport:
    """Put what was solved into the artifact, checked against PyTorch; its part of the report."""
    if not made.adapters:
        return made.scores
    assert made.slots is not None  # noqa: S101 - load_config wants slots where there are adapters
    for adapter in made.adapters:
        writer.write_adapter(
            adapter.task.name, adapter.factors, adapter_details(adapter, made.scores)
        )
    if not made.cases:
        return made.scores
    factors = {adapter.task.name: adapter.factors for adapter in made.adapters}
    parity = check_adapters(writer.folder, made.slots, factors, made.cases, progress=progress)
    return replace(made.scores, parity=parity)


# --- gates ----------------------------------------------------------------------------------------


def _check_parity(artifact: Path, progress: Progress) -> tuple[ParityReport, int]:
    """Check the artifact in a process that has nothing else: neither PyTorch nor the model.

    Returns:
      The report, and the most memory that this process and that one held together, in bytes.
    """
    command = [sys.executable, "-m", "eoracc.runtime.parity.check", str(artifact)]
    with progress.phase("parity", 1) as phase:
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - our own
        phase.advance()
    if done.returncode == EoraccError.exit_code:
        raise ArtifactError(done.stderr.strip())
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise RuntimeError(f"the process of the parity check fails: {said[-1]}")
    content = _PARITY_CHECK.parse(done.stdout, "the parity check")
    report = ParityReport.from_dict(content["report"])
    return report, resident_bytes() + content["peak_memory_bytes"]


def _check_gates(report: Report, work: Path) -> None:
    """Refuse the artifact where a gate failed; its report stays in the work folder."""
    failed = list(report.fidelity.exceeded)
    if report.parity and not report.parity["passed"]:
        failed.append(parity_line(report.parity))
    failed += refuse_adapters(report.adapters.parity)
    if not failed:
        return
    path = work / "report.json"
    replace_file(path, f"{json.dumps(report.as_dict(), indent=2)}\n".encode())
    raise GateError(f"{'; '.join(failed)}: no artifact was written, the report is {path}")
