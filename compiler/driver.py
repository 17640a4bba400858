"""The flow of a build, top to bottom.

    model.yaml -> load -> passes -> adapters -> fidelity gate -> each target: lower, write
               -> parity gate -> artifact

What takes long (a converted GGUF, the blocks that a sweep has finished) is kept in a work folder
beside the output until the build succeeds: a build that was interrupted goes on from there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eoracc.compiler.adapters.gates import (
    adapter_details,
    check_adapters,
    compare_compensations,
    record_adapters,
    refuse_adapters,
    score_adapters,
)
from eoracc.compiler.adapters.solve import SolvedAdapter, Task, load_task, solve_adapter
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import Progress, SilentProgress, cpu_seconds
from eoracc.compiler.report.content import (
    AdaptersReport,
    BuildReport,
    FactorizedReport,
    FidelityReport,
    LinearReport,
    Report,
    factorized_reports,
    linear_report,
    parity_line,
)
from eoracc.compiler.report.gates import fidelity_report
from eoracc.compiler.sweep.backbone import Backbone
from eoracc.compiler.sweep.executor import Executor
from eoracc.compiler.sweep.pipeline import compress
from eoracc.compiler.targets import TARGETS, Job
from eoracc.compiler.targets.artifact import ArtifactWriter, check_output, refuse_full_disk
from eoracc.compiler.targets.parity_record import AdapterCases
from eoracc.compiler.targets.tensorrt.engine_graph import check_contexts
from eoracc.compiler.text.windows import calibration_windows, evaluation_windows
from eoracc.errors import ArtifactError, EoraccError, GateError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph import spec
from eoracc.passes.graph.linears import Linear
from eoracc.passes.survey import SurveyPass
from eoracc.plugins.adapters import AdapterSlots
from eoracc.runtime.artifact.manifest import Manifest
from eoracc.runtime.memory import peak_bytes, release_memory, resident_bytes
from eoracc.runtime.parity.check import ParityReport

__all__ = ["BuildResult", "build"]


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
) -> BuildResult:
    """Build the artifact that ``config`` describes.

    Args:
      config: from model.yaml.
      config_dir: what its relative paths are relative to.
      progress: shown the phases, and asked for their times.
      force: replace an artifact that is there.

    Raises:
      EoraccError: bad input, in one sentence; nothing is left half-written.
      GateError: parity or a fidelity limit failed; no artifact is written.
    """
    output = config.output_path(config_dir)
    check_output(output, force=force)
    try:
        return _build(config, config_dir, output, progress, force=force)
    except Exception as error:
        refuse_full_disk(output, error)
        raise


def _build(
    config: BuildConfig, config_dir: Path, output: Path, progress: SilentProgress, *, force: bool
) -> BuildResult:
    begun_s, begun_cpu_s = time.perf_counter(), cpu_seconds()
    work = output.with_name(f".{output.name}.work")
    with ArtifactWriter(output, force=force) as writer:
        made = _make(config, config_dir, work, writer, progress)
        # The model and its weights are gone by now: checking needs the artifact alone.
        release_memory()
        parity, beside_bytes = (
            _check_parity(writer.folder, progress) if config.verify.parity else (None, 0)
        )
        adapters = _write_adapters(writer, made, progress)
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
            ),
            adapters=adapters,
            targets=made.targets,
        )
        _check_gates(report, work)
        writer.write_report(report)
        manifest = writer.commit(
            source={"model": config.model, "digest": made.digest},
            config=config.resolved(),
            parity=report.parity,
        )
    shutil.rmtree(work, ignore_errors=True)
    return BuildResult(output, manifest, report)


@dataclass(frozen=True)
class _Made:
    """What is left of a model once its artifact is written.

    Attributes:
      digest: of the checkpoint.
      fidelity: what was measured on held-out text.
      linears: what became of each.
      factorized: which weights became products of two of them.
      surveys: what each found.
      adapters: what was solved on top of it.
      scores: of the adapters.
      slots: where the model takes adapters; None where it takes none.
      cases: what it must compute with each; empty where parity is turned off.
      targets: what each built, for the report.
    """

    digest: str
    fidelity: FidelityReport
    linears: list[LinearReport]
    factorized: list[FactorizedReport]
    surveys: list[dict[str, Any]]
    adapters: list[SolvedAdapter]
    scores: AdaptersReport
    slots: AdapterSlots | None
    cases: Mapping[str, AdapterCases]
    targets: Mapping[str, Mapping[str, Any]]


def _make(
    config: BuildConfig, config_dir: Path, work: Path, writer: ArtifactWriter, progress: Progress
) -> _Made:
    """Load, compress, score and write; record what parity will be checked against."""
    for name in config.targets:
        TARGETS[name].require()
    with progress.phase("load", 1) as phase:
        loaded = load(
            config.model_source(config_dir), work=work, trust_remote_code=config.trust_remote_code
        )
        phase.advance()
    check_contexts(config, loaded)
    spec.check(loaded.model, spec.Stage.FRONTEND, after="the frontend")
    tokenizer = loaded.tokenizer()
    held_out = evaluation_windows(
        config.calibration, config.verify, tokenizer, config_dir=config_dir
    )
    calibration = (
        calibration_windows(config.calibration, config.verify, tokenizer, config_dir=config_dir)
        if config.calibration is not None
        and any(isinstance(item, Calibrate | SurveyPass) for item in config.passes)
        else None
    )
    tasks = [
        load_task(name, adapter, tokenizer, config_dir=config_dir)
        for name, adapter in config.adapters.items()
    ]
    release_memory()
    original = Executor(loaded.model.clone())
    compressed = compress(config, loaded, calibration, work / "sweep", progress)
    compensations = [item.name for item in config.passes if isinstance(item, Compensation)]
    shipped = " + ".join(compensations) or None
    factorized = next((one.name for one in config.passes if isinstance(one, Factorization)), None)
    release_memory()
    solved = _solve(config, compressed, tasks, work / "adapters", progress)
    fidelity = fidelity_report(
        original,
        Executor(compressed.model, compressed.linears),
        held_out,
        shipped=shipped,
        factorized=factorized,
        comparisons=compressed.comparisons,
        limits=config.verify.limits,
        progress=progress,
    )
    scores = _score_adapters(config, original, compressed, solved, work / "alone", progress)
    writer.copy(loaded.tokenizer_files())
    job = Job(
        config=config,
        loaded=loaded,
        compressed=compressed,
        original=original,
        held_out=held_out,
        writer=writer,
        work=work,
        progress=progress,
    )
    emitted = {name: TARGETS[name].emit(job) for name in config.targets}
    reports = [linear_report(linear) for linear in compressed.linears]
    products = factorized_reports(compressed.linears)
    cases: Mapping[str, AdapterCases] = {}
    if config.verify.parity and solved and "onnxruntime" in emitted:
        cases = record_adapters(
            compressed,
            solved,
            folder=loaded.folder,
            accuracy_level=config.onnxruntime.accuracy_level,
            trust_remote_code=loaded.trust_remote_code,
            progress=progress,
        )
    return _Made(
        digest=loaded.digest,
        fidelity=fidelity,
        linears=reports,
        factorized=products,
        surveys=compressed.surveys,
        adapters=solved,
        scores=scores,
        slots=next((one.slots for one in emitted.values()), None),
        cases=cases,
        targets={name: one.report for name, one in emitted.items() if one.report},
    )


# --- adapters -------------------------------------------------------------------------------------


def _solve(
    config: BuildConfig,
    backbone: Backbone,
    tasks: Sequence[Task],
    folder: Path,
    progress: Progress,
    **options: Any,  # noqa: ANN401 - of solve_adapter
) -> list[SolvedAdapter]:
    calibrate = next(
        (item for item in reversed(config.passes) if isinstance(item, Calibrate)), Calibrate()
    )
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
        [one.task for one in solved],
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
    for one in made.adapters:
        writer.write_adapter(one.task.name, one.factors, adapter_details(one, made.scores))
    if not made.cases:
        return made.scores
    factors = {one.task.name: one.factors for one in made.adapters}
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
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    content = json.loads(done.stdout)
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
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    raise GateError(f"{'; '.join(failed)}: no artifact was written, the report is {path}")
