"""Adapters in PEFT's form: ``adapter_config.json`` and ``adapter_model.safetensors``.

Modules are named as in transformers and factors are plain floats. PEFT multiplies their product by
``lora_alpha / r``: reading moves that factor into ``lora_b``, and files are written with 1. PEFT
has many kinds of LoRA that are no plain sum ``W + B A``, or that change more than weights: reading
rejects each of them by name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from eoracc.errors import ArtifactError
from eoracc.plugins.operands.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "encode_peft", "read_peft"]

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Options that leave an adapter a plain sum, or that have a check of their own."""

_REFUSED: Mapping[str, str] = {
    "alora_invocation_tokens": "it acts from some token of the text on (aLoRA)",
    "fan_in_fan_out": "its factors are those of transposed weights",
    "layer_replication": "it repeats layers of the model",
    "lora_bias": "it adds biases",
    "modules_to_save": "it replaces whole modules, which belong to the backbone",
    "target_parameters": "it is for parameters that are no linear's weight",
    "trainable_token_indices": "it replaces embeddings, which belong to the backbone",
    "use_dora": "it scales the weights themselves (DoRA)",
    "use_qalora": "it pools its inputs (QALoRA)",
}
"""Options that make an adapter more than low-rank factors, with the reason."""

_CHANGES_WEIGHTS = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""Initializations that subtract the adapter's first state from the model's weights."""

_DTYPES: Mapping[str, type[np.generic]] = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


@dataclass(frozen=True)
class _Scaling:
    """The factor by which PEFT multiplies ``lora_B lora_A``."""

    config: Mapping[str, Any]

    def rank(self, module: str) -> int:
        return int(self._of(module, "rank_pattern", "r"))

    def factor(self, module: str) -> float:
        rank = self.rank(module)
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return float(self._of(module, "alpha_pattern", "lora_alpha")) / divisor

    def _of(self, module: str, pattern: str, default: str) -> Any:  # noqa: ANN401 - a number
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return self.config[default]


def read_peft(folder: Path) -> dict[str, LowRank]:
    """Factors of a LoRA adapter that PEFT has saved.

    Returns:
      Float32 factors by module, with the scaling in ``lora_b``.

    Raises:
      ArtifactError: the adapter is no plain LoRA, a file is missing or damaged, or a value is not
        finite.
    """
    scaling = _Scaling(_read_config(folder / PEFT_CONFIG))
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        pickled = (folder / _PICKLED).is_file()
        raise ArtifactError(
            f"{path}: is missing"
            + (
                f", and {_PICKLED} is a pickle, which may run code when it is read"
                if pickled
                else ""
            )
            + ": save the adapter as safetensors"
        )
    modules: dict[str, dict[str, NDArray[np.float32]]] = {}
    foreign: list[str] = []
    for key, array in _read_tensors(path).items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
        else:
            modules.setdefault(match["module"], {})[match["factor"]] = array
    if foreign:
        # The file has no order. Factors explain more than the base weight beside them.
        key = min(foreign, key=lambda key: (_BASE_LAYER in key, key))
        raise ArtifactError(f"{path}: holds '{key}', {_reason(key)}")
    return {
        module: _factors(f"{path}: module '{module}'", module, parts, scaling)
        for module, parts in modules.items()
    }


def _reason(key: str) -> str:
    if "magnitude" in key:
        return "which scales the weights themselves (DoRA): train it without use_dora"
    if _BASE_LAYER in key:
        return "a weight itself, which belongs to the backbone: leave it out of the targets"
    if "embedding" in key:
        return "factors of an embedding, which belongs to the backbone: leave it out of the targets"
    if key.endswith("bias"):
        return "a bias: train it with bias none and without lora_bias"
    return "which is neither lora_A nor lora_B of a module: save the adapter with PEFT"


def _factors(
    place: str, module: str, parts: Mapping[str, NDArray[np.float32]], scaling: _Scaling
) -> LowRank:
    if set(parts) != {"A", "B"}:
        raise ArtifactError(f"{place}: has lora_{min(parts)} and not the other factor")
    a, b = parts["A"], parts["B"]
    try:
        rank, factor = scaling.rank(module), scaling.factor(module)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, re.error):
        raise ArtifactError(
            f"{place}: {PEFT_CONFIG} has no valid r and lora_alpha for it"
        ) from None
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise ArtifactError(
            f"{place}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not have rank {rank}, "
            f"which {PEFT_CONFIG} gives"
        )
    b = b * np.float32(factor)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ArtifactError(f"{place}: its factors hold NaN or Inf")
    return LowRank(lora_a=a, lora_b=b)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"{path}: is missing: give a folder that PEFT has saved an adapter to"
        ) from None
    except (OSError, ValueError):
        raise ArtifactError(f"{path}: cannot be read as JSON") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ArtifactError(f"{path}: is a PEFT adapter of type {kind}: only LORA is known")
    if config.get("bias", "none") != "none":
        raise ArtifactError(f"{path}: 'bias' is {config['bias']!r}: it replaces biases")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_WEIGHTS):
        raise ArtifactError(
            f"{path}: 'init_lora_weights' is {start!r}: it is for weights that its training has "
            "changed: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key, value in config.items():
        if value and key not in _PLAIN:
            raise ArtifactError(
                f"{path}: {key!r} is set: {_REFUSED.get(key, 'that kind of LoRA is not known')}"
            )
    return dict(config)


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    try:
        tensors = safetensors.deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors: {error}") from None
    return {name: _array(f"{path}: '{name}'", tensor) for name, tensor in tensors}


def _array(place: str, tensor: Mapping[str, Any]) -> NDArray[np.float32]:
    dtype, data = tensor["dtype"], bytes(tensor["data"])
    if dtype == "BF16":  # the upper half of a float32
        flat = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif dtype in _DTYPES:
        flat = np.frombuffer(data, _DTYPES[dtype]).astype(np.float32)
    else:
        raise ArtifactError(f"{place}: is of type {dtype}: save it as float32, float16 or bfloat16")
    array: NDArray[np.float32] = flat.reshape(tensor["shape"])
    return array


def encode_peft(factors: Mapping[str, LowRank]) -> dict[str, bytes]:
    """An adapter's files in PEFT's form, by name; equal adapters give equal bytes.

    Args:
      factors: by module. Modules of rank 0 are left out.

    Returns:
      ``adapter_config.json``, with the rank of each module and no scaling, and
      ``adapter_model.safetensors``: float16 where all factors are float16, float32 otherwise.
    """
    used = {module: own for module, own in sorted(factors.items()) if own.rank}
    half = all(own.factor_type == "float16" and own.lora_a_scale is None for own in used.values())
    dtype = np.float16 if half else np.float32
    tensors = {
        f"{_PREFIX}{module}.lora_{factor}.weight": np.ascontiguousarray(values, dtype)
        for module, own in used.items()
        for factor, values in (("A", own.down()), ("B", own.up()))
    }
    ranks = {module: own.rank for module, own in used.items()}
    ((common, _),) = Counter(ranks.values()).most_common(1) or [(1, 0)]
    # PEFT reads keys as regular expressions for the end of a name.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "r": common,
        "target_modules": list(used),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    text = json.dumps(config, indent=2) + "\n"
    return {PEFT_CONFIG: text.encode(), PEFT_WEIGHTS: save(tensors, {"format": "pt"})}
