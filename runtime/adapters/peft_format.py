"""Adapters in PEFT's form: ``adapter_config.json`` and ``adapter_model.safetensors``.

Modules are named as in transformers and factors are plain floats. PEFT multiplies their product by
a number (:mod:`eoracc.runtime.adapters.peft_config`): reading moves it into ``lora_b``, and files
are written with 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.printable import printable
from eoracc.runtime.adapters.peft_config import PEFT_CONFIG, PeftConfig
from eoracc.tensor_files import read_tensor_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from eoracc.tensor_files import TensorEntry

__all__ = ["PEFT_CONFIG", "PEFT_WEIGHTS", "encode_peft", "read_peft"]

PEFT_WEIGHTS = "adapter_model.safetensors"

_READER = Reader(ArtifactError, "save the adapter with PEFT again", constants=True)
_MAX_WEIGHTS = 1 << 36
"""Bytes; the factors of any model are far smaller."""

_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

_DTYPES: Mapping[str, type[np.generic]] = {
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}


def read_peft(folder: Path) -> dict[str, LowRank]:
    """Factors of a LoRA adapter that PEFT has saved.

    Returns:
      Float32 factors by module, with the scaling in ``lora_b``.

    Raises:
      ArtifactError: the adapter is no plain LoRA, a file is missing or damaged, or a value is not
        finite.
    """
    config = PeftConfig.read(folder / PEFT_CONFIG)
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
        raise ArtifactError(f"{path}: holds '{printable(key)}', {_reason(key)}")
    return {
        module: _factors(f"{path}: module '{printable(module)}'", module, parts, config)
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
    place: str, module: str, parts: Mapping[str, NDArray[np.float32]], config: PeftConfig
) -> LowRank:
    if set(parts) != {"A", "B"}:
        raise ArtifactError(f"{place}: has lora_{min(parts)} and not the other factor")
    a, b = parts["A"], parts["B"]
    rank, factor = config.rank_of(module), config.factor_of(module)
    if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
        raise ArtifactError(
            f"{place}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not have rank {rank}, "
            f"which {PEFT_CONFIG} gives"
        )
    with np.errstate(over="ignore"):  # what is not finite is refused below
        b = b * np.float32(factor)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ArtifactError(f"{place}: its factors hold NaN or Inf")
    return LowRank(lora_a=a, lora_b=b)


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    header = read_tensor_header(path, _READER)
    content = memoryview(_READER.read_bytes(path, limit=_MAX_WEIGHTS))
    return {
        name: _array(f"{path}: '{printable(name)}'", entry, content[entry.begin : entry.end])
        for name, entry in header.tensors.items()
    }


def _array(place: str, entry: TensorEntry, data: memoryview) -> NDArray[np.float32]:
    if entry.dtype == "BF16":  # the upper half of a float32
        flat = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif entry.dtype in _DTYPES:
        with np.errstate(over="ignore"):  # to Inf, which is refused
            flat = np.frombuffer(data, _DTYPES[entry.dtype]).astype(np.float32)
    else:
        raise ArtifactError(
            f"{place}: is of type {printable(entry.dtype)}: save it as float32, float16 or bfloat16"
        )
    array: NDArray[np.float32] = flat.reshape(entry.shape)
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
