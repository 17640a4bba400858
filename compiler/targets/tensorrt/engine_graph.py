"""Write the lowered graph of a TensorRT target, before engines are built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.compiler.config.sections import engine_sections
from eoracc.compiler.targets.artifact import MODEL_FILE
from eoracc.compiler.targets.genai_config import genai_config
from eoracc.compiler.targets.parity_record import PARITY_STEPS
from eoracc.compiler.targets.record_size import save_record
from eoracc.compiler.targets.tensorrt.dequantize import rounded_product
from eoracc.compiler.targets.tensorrt.engines.bindings import bindings_of, profiles_for
from eoracc.compiler.targets.tensorrt.half_precision import HALF
from eoracc.compiler.targets.tensorrt.parity_record import GraphWeight, record_graph_parity
from eoracc.errors import ConfigError
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlot, AdapterSlots
from eoracc.runtime.artifact.long_rope import LongRope
from eoracc.runtime.parity.record import PARITY_FILE
from eoracc.runtime.tensorrt.engine_set import Binding, EngineFile, EngineSet, Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eoracc.compiler.config.sections import BuildConfig, TargetName
    from eoracc.compiler.config.tensorrt import EngineConfig
    from eoracc.compiler.frontend.load import LoadedModel
    from eoracc.compiler.targets.job import Job

__all__ = ["EngineGraph", "check_contexts", "record_engine_graph", "write_engine_graph"]

_LORA_A, _LORA_B = ".lora_a", ".lora_b"


@dataclass(frozen=True, eq=False)
class EngineGraph:
    """The graph of the engines, in its place in the artifact.

    Attributes:
      path: the ONNX file, its weights beside it, until the artifact is committed.
      options: the target's section of model.yaml.
      bindings: inputs and outputs.
      profiles: which calls engines are built for.
      slots: where it takes adapters; None where it takes none.
      weight_bytes: of all its constants: what an engine that stores each once needs for them.
    """

    path: Path
    options: EngineConfig
    bindings: tuple[Binding, ...]
    profiles: tuple[Profile, ...]
    slots: AdapterSlots | None
    weight_bytes: int

    def engine_set(self, *, package: str, version: str, engines: Sequence[EngineFile]) -> EngineSet:
        """The content of engines.json for engines of this graph.

        Args:
          package: what built them, ``tensorrt_rtx`` or ``tensorrt``.
          version: of it.
          engines: in any order.
        """
        pasts = [past for past in self.bindings if past.name.startswith("past_key_values.")]
        in_place = all(isinstance(past.shape[2], int) for past in pasts)
        takes_adapters = self.slots is not None
        return EngineSet(
            package=package,
            version=version,
            graph=self.path.name,
            dtype=self.options.dtype,
            context_length=self.options.context_length,
            cache_layout="in_place" if in_place else "concat",
            cache_layers=len(pasts) // 2,
            adapter_type=self.options.dtype if takes_adapters else "none",
            max_rank=self.options.rank[2] if takes_adapters else 0,
            profiles=self.profiles,
            bindings=self.bindings,
            engines=tuple(sorted(engines, key=lambda engine: float(engine.compute_capability))),
        )


def check_contexts(config: BuildConfig, loaded: LoadedModel) -> None:
    """Refuse engines for longer texts than the model has positions for.

    Texts of a LongRoPE model must stay within its original length: an engine picks no rotary
    embedding by the length of a row.

    Raises:
      ConfigError: a target's ``context_length`` is larger.
    """
    long_rope = LongRope.of(loaded.model.metadata_props)
    positions, kind = loaded.config.max_position_embeddings, "positions"
    if long_rope is not None:
        positions, kind = long_rope.original, "positions before its LongRoPE changes"
    for section, options in engine_sections(config).items():
        if options.context_length > positions:
            raise ConfigError(
                f"{section}.context_length: is {options.context_length}, and the model has "
                f"{positions} {kind}: lower it to that"
            )


def write_engine_graph(
    job: Job, lowered: ir.Model, *, target: TargetName, options: EngineConfig
) -> EngineGraph:
    """Write ``lowered`` and its companion files into the target's folder.

    That it takes adapters goes into its metadata, as a slot for each linear. Where nothing lies at
    the artifact's root for ONNX Runtime, genai_config.json still says there what tokens are
    special, and where the graph is.

    Args:
      job: what is written.
      lowered: for TensorRT; its metadata are added to.
      target: whose folder it goes into.
      options: the target's section of model.yaml.

    Raises:
      ArtifactError: the disk has less room than the weights need.
    """
    bindings = bindings_of(lowered.graph)
    slots = _slots(bindings)
    if slots is not None:
        lowered.metadata_props[SLOTS_KEY] = slots.to_json()
    path = job.writer.write_model(lowered, target)
    if "onnxruntime" not in job.config.targets:
        job.writer.write_genai_config(
            genai_config(
                job.loaded.config,
                lowered,
                generation=job.loaded.generation,
                filename=f"{target}/{MODEL_FILE}",
            )
        )
    weights = (value.const_value for value in lowered.graph.initializers.values())
    return EngineGraph(
        path=path,
        options=options,
        bindings=bindings,
        profiles=profiles_for(options, bindings),
        slots=slots,
        weight_bytes=sum(weight.nbytes for weight in weights if weight is not None),
    )


def record_engine_graph(
    job: Job, graph: EngineGraph, *, weight_of: GraphWeight = rounded_product
) -> None:
    """Write the parity record beside the graph, if model.yaml enables parity.

    Args:
      job: what is written.
      graph: in its place.
      weight_of: what it multiplies with for a compressed weight.
    """
    if not job.config.verify.parity:
        return
    with job.progress.phase(f"record {graph.path.parent.name}", PARITY_STEPS) as phase:
        record = record_graph_parity(
            job.compressed.linears,
            job.compressed.embeddings,
            job.original,
            job.held_out,
            graph=graph.path,
            dtype=HALF[graph.options.dtype],
            folder=job.loaded.folder,
            phase=phase,
            weight_of=weight_of,
            trust_remote_code=job.loaded.trust_remote_code,
        )
    save_record(record, graph.path.with_name(PARITY_FILE))


def _slots(bindings: Sequence[Binding]) -> AdapterSlots | None:
    """A slot for each linear that has inputs for factors."""
    shapes = {binding.name: binding.shape for binding in bindings if binding.mode == "input"}
    slots = []
    for name, shape in shapes.items():
        if name.endswith(_LORA_A):
            linear = name.removesuffix(_LORA_A)
            rows, columns = int(shapes[linear + _LORA_B][0]), int(shape[1])
            slots.append(AdapterSlot(linear, (linear,), (rows,), columns, rows))
    return AdapterSlots("float16", tuple(slots)) if slots else None
