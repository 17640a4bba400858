"""The target ``onnxruntime``: model.onnx with the fused op, its library, genai_config.json."""

from __future__ import annotations

from eoracc.compiler.report.content import WarningReport
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.onnxruntime.lower import artifact_graph
from eoracc.compiler.targets.parity_record import (
    PARITY_STEPS,
    record_parity,
    rounding_excess,
    without_rounding,
)
from eoracc.compiler.targets.record_size import save_record
from eoracc.passes.graph import spec
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.plugins.library import library_path
from eoracc.runtime.parity.record import PARITY_FILE, ParityCase, ParityRecord

__all__ = ["emit", "require"]


def require() -> None:
    """Check that the native library is there.

    Raises:
      PluginError: it is not.
    """
    library_path()


def emit(job: Job) -> Emitted:
    """Write the graph at the artifact's root, and record what it must compute.

    Raises:
      PassError: the lowering left an operator that may not stand there.
    """
    options, writer = job.config.onnxruntime, job.writer
    level, warnings = options.accuracy_level, list[WarningReport]()
    record = _parity(job) if job.config.verify.parity else None
    if record is not None and (case := rounding_excess(record)):
        level, warnings = 0, [_float_activations(case, record.compression_effect)]
        record = without_rounding(record)
    lowered = artifact_graph(
        job.compressed.model, accuracy_level=level, adapter_type=options.adapter_type
    )
    spec.check(lowered, spec.Stage.ONNXRUNTIME, after="the lowering")
    job.graphs.keep("onnxruntime", lowered)
    writer.write_model(lowered)
    writer.write_genai_config(
        genai_config(
            job.loaded.config,
            lowered,
            generation=job.loaded.generation,
            custom_ops_library=writer.write_library(library_path()),
        )
    )
    if record is not None:
        save_record(record, writer.folder / PARITY_FILE)
    slots = lowered.metadata_props.get(SLOTS_KEY)
    return Emitted(
        None if slots is None else AdapterSlots.from_json(slots),
        report={},
        warnings=warnings,
        accuracy_level=level,
    )


def _parity(job: Job) -> ParityRecord:
    with job.progress.phase("record", PARITY_STEPS) as phase:
        return record_parity(
            job.compressed.linears,
            job.compressed.embeddings,
            job.original,
            job.held_out,
            folder=job.loaded.folder,
            phase=phase,
            accuracy_level=job.config.onnxruntime.accuracy_level,
            trust_remote_code=job.loaded.trust_remote_code,
        )


def _float_activations(case: ParityCase, effect: float) -> WarningReport:
    bound = case.tolerance + case.rounding
    return WarningReport(
        code="float_activations",
        linear=None,
        message=f"int8 activations may move a logit by up to {bound:.3g} ({case.name}), and "
        f"compression moves one by {effect:.3g}, so that parity would prove nothing: the artifact "
        "has 'accuracy_level: 0'",
        figures={"bound": bound, "compression_effect": effect},
    )
