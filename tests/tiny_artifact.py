"""A whole artifact of a random two-layer model, with a tokenizer and the native library.

With slots for adapters, and adapters for them::

    folder = write_tiny_artifact(work, adapter_type="int8")
    slots = tiny_slots(folder)
    factors = tiny_factors(slots, rank=4, seed=1)  # by linear, of a type that the slots take
    arrays = pack_adapter(slots, factors)          # by graph input, what a session is fed
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear
    from eoracc.plugins.adapters import AdapterSlots
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = [
    "reseal",
    "tiny_factors",
    "tiny_linears",
    "tiny_slots",
    "tiny_weights",
    "write_byte_tokenizer",
    "write_tiny_artifact",
]

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_VOCABULARY = len(_SPECIAL) + 256

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {{ opening | default('') }}{% endif %}"
)


def write_byte_tokenizer(folder: Path, *, bos: bool = False, chat: bool = False) -> Path:
    """A tokenizer whose tokens are single bytes, in Hugging Face's form.

    Args:
      folder: an existing folder.
      bos: begin every text with ``<s>``.
      chat: give it a chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    factory: Any = PreTrainedTokenizerFast
    fast = factory(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def tiny_linears(work: Path) -> list[Linear]:
    """The compressed linears of what :func:`write_tiny_artifact` wrote, compressed anew."""
    from eoracc.compiler.frontend import load as frontend

    linears = _compress(frontend.load(str(work / "checkpoint"), work=work).model)
    return [linear for linear in linears if linear.compressed is not None]


def tiny_weights(work: Path) -> dict[str, NDArray[np.float32]]:
    """The weights of what :func:`write_tiny_artifact` wrote, by module, as it computes with them.

    Its head is tied, so the embedding is the same table.
    """
    weights = {linear.name: linear.effective_weight() for linear in tiny_linears(work)}
    return {**weights, "model.embed_tokens": weights["lm_head"]}


def _compress(model: ir.Model) -> list[Linear]:
    from eoracc.passes.compensate.svd import Svd
    from eoracc.passes.graph.embeddings import find_embeddings
    from eoracc.passes.graph.linears import LinearGroup, find_linears
    from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
    from eoracc.passes.quantize.quantize_rtn import QuantizeRtn

    linears = find_linears(model)
    quantize, compensate = QuantizeRtn(bits=3, group_size=16), Svd(rank=2)
    for linear in linears:
        group = LinearGroup((linear,))
        quantize.call(group)
        compensate.call(group)
    quantize_embedding_tables(quantize, find_embeddings(model), linears)
    return linears


def tiny_slots(folder: Path) -> AdapterSlots:
    """The slots of an artifact, read from its model's metadata."""
    import onnx_ir as ir

    from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots

    return AdapterSlots.from_json(ir.load(folder / "model.onnx").metadata_props[SLOTS_KEY])


def tiny_factors(
    slots: AdapterSlots, *, rank: int, seed: int, factor_type: str | None = None, size: float = 0.3
) -> dict[str, LowRank]:
    """Random factors for every linear that has a slot.

    Args:
      slots: of the artifact.
      rank: of every linear.
      seed: of the values.
      factor_type: ``int8``, ``int4`` or ``float16``; the slots' own unless given.
      size: norm of each linear's product; the weights' own is about the root of their rows.
    """
    from eoracc.passes.solvers.factor_types import store_factors

    rng = np.random.default_rng(seed)
    factors = {}
    for name, (rows, columns) in slots.linears.items():
        b, a = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
        b *= size * np.sqrt(rows) / max(np.linalg.norm(b @ a), 1e-30)
        factors[name] = store_factors(b, a, factor_type or slots.type)  # type: ignore[arg-type]
    return factors


def write_tiny_artifact(
    work: Path,
    *,
    adapter_type: str = "none",
    family: str = "smollm",
    compress: bool = True,
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Build ``work/artifact`` from a small random model in 3 bits, without calibration.

    The checkpoint it was built from is ``work/checkpoint``.

    Args:
      work: an existing folder.
      adapter_type: of its slots: ``int8``, ``float16``, or ``none`` for an artifact without.
      family: of the model.
      compress: whether to compress it; its weights stay float32 otherwise.
      fields: of its configuration, see :func:`tests.tiny_models.tiny_model`.
    """
    from eoracc.compiler.frontend import load as frontend
    from eoracc.compiler.report.content import BuildReport, FidelityReport, FidelityRow, Report
    from eoracc.compiler.report.linears import linear_report
    from eoracc.compiler.targets.artifact import ArtifactWriter
    from eoracc.compiler.targets.genai_config import genai_config
    from eoracc.compiler.targets.onnxruntime.lower import lower
    from eoracc.compiler.targets.tokens import ship_tokenizer
    from eoracc.plugins.library import library_path

    source = tiny_model(family, work / "checkpoint", **{"vocab_size": _VOCABULARY, **fields})
    write_byte_tokenizer(source, chat=True)
    loaded = frontend.load(str(source), work=work)
    linears = _compress(loaded.model) if compress else []
    lowered = lower(loaded.model, adapter_type=adapter_type)
    row = FidelityRow(
        name="original",
        perplexity=12.5,
        kl=0.0,
        top1_agreement=1.0,
        last_layer_error=0.0,
        bytes=1234,
        bits_per_weight=32.0,
    )
    with ArtifactWriter(work / "artifact") as writer:
        writer.write_model(lowered)
        ship_tokenizer(loaded, loaded.tokenizer(), writer.folder)
        library = writer.write_library(library_path())
        writer.write_genai_config(genai_config(loaded.config, lowered, custom_ops_library=library))
        writer.commit(
            source={"model": "tiny", "digest": loaded.digest},
            config={},
            parity={},
            packages={},
            report=Report(
                fidelity=FidelityReport(rows=[row], windows=1, window_length=2),
                parity={},
                linears=[linear_report(linear) for linear in linears],
                build=BuildReport(wall_s=1.0, cpu_s=2.0, peak_memory_bytes=3, phases=[]),
            ),
        )
    return work / "artifact"


def reseal(folder: Path) -> None:
    """Let the manifest be that of what the folder holds."""
    from eoracc.runtime.artifact.manifest import (
        MANIFEST_FILE,
        Manifest,
        describe_folder,
        read_manifest,
    )

    manifest = read_manifest(folder)
    sections = {name: getattr(manifest, name) for name in ("source", "config", "packages")}
    written = Manifest.of(describe_folder(folder), **sections, parity=manifest.parity)
    (folder / MANIFEST_FILE).write_text(written.to_json())
