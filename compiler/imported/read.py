"""Read a checkpoint that somebody else has compressed, beside the original that it was made from.

Its linears are taken over bit by bit. Everything else (embeddings, norms, biases, a head in floats)
is the original's: a checkpoint in which that differs by more than rounding to 16 bits computes with
other weights than the original, so that no difference of single weights could be given back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eoracc.compiler.frontend.config import read_config_file
from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.compiler.frontend.files import digest_files, find_checkpoint
from eoracc.compiler.frontend.weights import read_tensors, weight_files
from eoracc.compiler.imported.belongs import check_config, check_tokenizer, is_rounded
from eoracc.compiler.imported.gptq import Gptq
from eoracc.compiler.imported.tensors import StoredTensors
from eoracc.errors import ModelError
from eoracc.passes.graph.imported import ImportedWeight
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.printable import printable, quoted

if TYPE_CHECKING:
    import torch

    from eoracc.compiler.frontend.load import LoadedModel

__all__ = ["CompressedCheckpoint", "read_compressed"]


@dataclass(frozen=True, eq=False)
class CompressedCheckpoint:
    """The weights of a compressed checkpoint.

    Attributes:
      weights: loads the weight of each linear, by its name; those that are as in the original are
        left out.
      digest: sha256 over its config.json and its weight files, hexadecimal.
    """

    weights: Mapping[str, Callable[[], ImportedWeight]]
    digest: str


class _Packed(Protocol):
    """Reads linears in codes."""

    part: str
    """Last part of the name of the tensor that each of them has."""

    def weight(self, module: str, out_features: int, in_features: int) -> ImportedWeight:
        """The weight ``[N, K]`` of the linear ``module``."""


def read_compressed(source: str, loaded: LoadedModel, *, work: Path) -> CompressedCheckpoint:
    """Read the compressed checkpoint ``source`` of the model ``loaded``.

    Args:
      source: hub id or local folder.
      loaded: the original; its graph is not changed.
      work: folder for what has to be converted.

    Raises:
      ModelError: it is missing, damaged, packed in an unknown way, or of another model.
    """
    folder = find_checkpoint(source, work)
    content = read_config_file(folder, quantized=True)
    check_config(loaded, folder / "config.json", content)
    check_tokenizer(loaded, folder)
    files = weight_files(folder, content, quantized=True)
    tensors = StoredTensors(folder, files)
    packed = _packed(folder, content, tensors)
    originals = read_tensors(weight_files(loaded.folder, read_config_file(loaded.folder)))
    weights: dict[str, Callable[[], ImportedWeight]] = {}
    modules = set()
    for linear in find_linears(loaded.model):
        modules.add(linear.name)
        _check_layout(linear, originals, loaded.folder)
        load = _loader(linear, tensors, packed)
        if load is not None:
            weights[linear.name] = load
    if not weights:
        raise ModelError(f"{folder}: has the weights of the original model: nothing is compressed")
    _check_others(tensors, originals, modules)
    return CompressedCheckpoint(weights, digest_files([folder / "config.json", *files]))


def _packed(folder: Path, content: Mapping[str, Any], tensors: StoredTensors) -> _Packed | None:
    """The reader of the codes; None for a checkpoint in floats.

    Raises:
      ModelError: they are packed in an unknown way.
    """
    settings = content.get("quantization_config")
    if settings is None and (folder / "quantize_config.json").is_file():
        settings = CHECKPOINT.read_object(folder / "quantize_config.json")
        settings.setdefault("quant_method", "gptq")  # AutoGPTQ's file, before there were others
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / 'config.json'}: quantization_config is no object")
    method = settings.get("quant_method")
    if method == "gptq":
        return Gptq(tensors, settings)
    raise ModelError(
        f"{folder}: is compressed by quant_method {quoted(method)}, which is not read: give a "
        "checkpoint of GPTQ, or one in floats"
    )


def _check_layout(linear: Linear, originals: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Check that a linear of the graph is one module of the checkpoint, row by row."""
    if linear.tied:
        return
    stored = originals.get(f"{linear.name}.weight")
    if stored is None or not np.array_equal(linear.weight(), stored.float().numpy()):
        raise ModelError(
            f"{folder}: the linear {printable(linear.name)} is no module of its own in checkpoints "
            "of this family, so that no compressed checkpoint can be taken over"
        )


def _loader(
    linear: Linear, tensors: StoredTensors, packed: _Packed | None
) -> Callable[[], ImportedWeight] | None:
    """What loads the weight of a linear; None where it is the original one."""
    module, shape = linear.name, (linear.out_features, linear.in_features)
    if packed is not None and f"{module}.{packed.part}" in tensors:
        if linear.tied:
            raise ModelError(
                f"{tensors.folder}: the head {printable(module)} is quantized apart from the "
                "embeddings, to which it is tied in the original model: leave it in floats"
            )
        return partial(packed.weight, module, *shape)
    name = f"{module}.weight"
    if linear.tied and name not in tensors:
        return None
    original, stored = linear.weight(), tensors.floats(name, shape)
    # A head has been rounded with the embeddings and the norms, and is theirs.
    if np.array_equal(original, stored) or (linear.block is None and is_rounded(original, stored)):
        return None
    return partial(_floats, tensors, name, shape)


def _floats(tensors: StoredTensors, name: str, shape: tuple[int, int]) -> ImportedWeight:
    return ImportedWeight(DenseWeight(np.asfortranarray(tensors.floats(name, shape))))


def _check_others(
    tensors: StoredTensors, originals: Mapping[str, torch.Tensor], modules: set[str]
) -> None:
    """Check what is no weight of a linear against the original.

    Raises:
      ModelError: a tensor differs by more than rounding, or the original has no such tensor.
    """
    for name in tensors:
        module, _, part = name.rpartition(".")
        if module in modules and part != "bias":
            continue
        stored = tensors.floats(name, tensors.shape(name))
        original = originals.get(name)
        if original is None and part == "bias" and not stored.any():
            continue  # AutoGPTQ adds a bias of zeros
        if original is None or not is_rounded(original.float().numpy(), stored):
            differs = "is not in" if original is None else "differs from"
            raise ModelError(
                f"{tensors.folder}: the tensor {printable(name)} {differs} the original model, and "
                "only weights of linears can be given back: give the model that it was made from "
                "as 'model'"
            )
