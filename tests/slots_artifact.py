"""An artifact that is nothing but slots: enough for what stores adapters, made in milliseconds.

``tests/tiny_artifact.py`` has one that computes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx

from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlot, AdapterSlots
from eoracc.plugins.operands.codes import LARGEST
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, Manifest, describe_folder

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LAYER", "SLOTS", "random_factors", "write_slots_artifact"]

LAYER = "model.layers.0"

SLOTS = (
    AdapterSlot(
        name=f"{LAYER}.self_attn.qkv_proj",
        linears=tuple(f"{LAYER}.self_attn.{role}_proj" for role in "qkv"),
        parts=(48, 16, 16),
        in_features=40,
        out_features=80,
    ),
    AdapterSlot(f"{LAYER}.self_attn.o_proj", (f"{LAYER}.self_attn.o_proj",), (40,), 48, 40),
    # Packed before compression: one linear of two parts.
    AdapterSlot(f"{LAYER}.mlp.gate_up_proj", (f"{LAYER}.mlp.gate_up_proj",), (32, 32), 40, 64),
    AdapterSlot(f"{LAYER}.mlp.down_proj", (f"{LAYER}.mlp.down_proj",), (40,), 32, 40),
)


def write_slots_artifact(
    folder: Path, *, adapter_type: str | None = "int8", weights: bytes = b"weights"
) -> Manifest:
    """Write the artifact.

    Args:
      folder: to be made.
      adapter_type: of its slots; None for an artifact without.
      weights: content of a file: another one makes another backbone.
    """
    folder.mkdir(parents=True)
    graph = onnx.helper.make_graph([], "slots", [], [])
    model = onnx.helper.make_model(graph)
    if adapter_type is not None:
        slots = AdapterSlots(adapter_type, SLOTS)
        onnx.helper.set_model_props(model, {SLOTS_KEY: slots.to_json()})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(weights)
    decoder = {
        "filename": "model.onnx",
        "head_size": 16,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    config = {"model": {"type": "llama", "context_length": 64, "decoder": decoder}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    report: dict[str, dict[str, object]] = {"build": {}, "adapters": {"perplexity": {}}}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    manifest = Manifest.of(
        describe_folder(folder), source={"model": "m"}, config={}, packages={}, parity={}
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json())
    return manifest


def random_factors(
    factor_type: str, *, rank: int = 3, seed: int = 0, linears: tuple[str, ...] | None = None
) -> dict[str, LowRank]:
    """Factors for the linears of :data:`SLOTS`, or for some of them."""
    rng = np.random.default_rng(seed)
    shapes = AdapterSlots("int8", SLOTS).linears
    return {
        name: _random(rng, shapes[name], rank, factor_type)
        for name in (shapes if linears is None else linears)
    }


def _random(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, factor_type: str
) -> LowRank:
    rows, columns = shape
    if factor_type.startswith("float"):
        dtype = np.dtype(factor_type)
        return LowRank(
            lora_a=rng.standard_normal((rank, columns)).astype(dtype),
            lora_b=rng.standard_normal((rows, rank)).astype(dtype),
        )
    bits = int(factor_type.removeprefix("int"))
    most = LARGEST[bits]
    return LowRank(
        lora_a=rng.integers(-most, most + 1, (rank, columns)).astype(np.int8),
        lora_b=rng.integers(-most, most + 1, (rows, rank)).astype(np.int8),
        lora_a_scale=rng.uniform(0.01, 0.1, rank).astype(np.float32),
        lora_b_scale=rng.uniform(0.01, 0.1, rows).astype(np.float32),
        bits=bits,
    )
