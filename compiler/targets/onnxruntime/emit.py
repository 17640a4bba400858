"""The target ``onnxruntime``: model.onnx with the fused op, its library, genai_config.json."""

from __future__ import annotations

from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.job import Emitted, Job
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.compiler.targets.parity_record import PARITY_STEPS, record_parity
from eoracc.passes.graph import spec
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.plugins.library import library_path
from eoracc.runtime.parity.record import PARITY_FILE

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
    lowered = lower(
        job.compressed.model,
        accuracy_level=options.accuracy_level,
        adapter_type=options.adapter_type,
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
    if job.config.verify.parity:
        _record_parity(job)
    slots = lowered.metadata_props.get(SLOTS_KEY)
    return Emitted(None if slots is None else AdapterSlots.from_json(slots), report={})


def _record_parity(job: Job) -> None:
    with job.progress.phase("record", PARITY_STEPS) as phase:
        record = record_parity(
            job.compressed.linears,
            job.compressed.embeddings,
            job.original,
            job.held_out,
            folder=job.loaded.folder,
            phase=phase,
            accuracy_level=job.config.onnxruntime.accuracy_level,
            trust_remote_code=job.loaded.trust_remote_code,
        )
    record.save(job.writer.folder / PARITY_FILE)
