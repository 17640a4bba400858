"""Choose the backend of an artifact and open it.

``onnxruntime`` runs the model at the artifact's root on the CPU. ``tensorrt_rtx`` and ``tensorrt``
run TensorRT engines, from the folders of these names, on an NVIDIA GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from eoracc.errors import ArtifactError, BackendError, EoraccError
from eoracc.runtime.adapters.adapter import Adapter, combine
from eoracc.runtime.adapters.files import (
    check_adapter_exists,
    listed_adapters,
    read_listed_adapter,
)
from eoracc.runtime.adapters.slots import find_slots
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.decode.bank import AdapterBank, FactorsOf, Weights
from eoracc.runtime.onnxruntime.decoder import GraphDecoder
from eoracc.runtime.onnxruntime.graph import Graph
from eoracc.runtime.onnxruntime.inference import open_inference, ort_values
from eoracc.runtime.onnxruntime.native_library import choose_library
from eoracc.runtime.onnxruntime.own_memory import own_mapped_files
from eoracc.runtime.tensorrt.decoder import TensorRTDecoder
from eoracc.runtime.tensorrt.engine_set import ENGINES_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.plugins.operands.low_rank import LowRank
    from eoracc.runtime.artifact.manifest import Manifest
    from eoracc.runtime.decode.decoder import Decoder

__all__ = ["Backend", "BackendChoice", "Opened", "backends_of", "open_backend"]

Backend: TypeAlias = Literal["onnxruntime", "tensorrt_rtx", "tensorrt"]
"""A runtime for models."""

BackendChoice: TypeAlias = Literal["auto", "onnxruntime", "tensorrt_rtx", "tensorrt"]
"""A backend, or ``auto`` for the best one that this machine can run."""

_ENGINES: tuple[Backend, ...] = ("tensorrt_rtx", "tensorrt")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model that is ready to run.

    Attributes:
      backend: that runs it.
      device: description of the CPU or GPU that it runs on.
      decoder: the model.
      fallback_reason: why ONNX Runtime runs an artifact that has TensorRT engines, where
        :func:`open_backend` made that choice; else None.
      library_note: why the native library is not the artifact's own; None if it is, or equal.
      device_bytes: measures the GPU memory in use; gives None without a GPU.
    """

    backend: Backend
    device: str
    decoder: Decoder
    fallback_reason: str | None = None
    library_note: str | None = None
    device_bytes: Callable[[], int | None] = lambda: None


def backends_of(manifest: Manifest) -> tuple[Backend, ...]:
    """Backends that an artifact has been built for, TensorRT first.

    A target ``tensorrt`` counts once ``eoracc engine`` has built its engines.
    """
    engines = tuple(name for name in _ENGINES if f"{name}/{ENGINES_FILE}" in manifest.files)
    return (*engines, "onnxruntime") if "model.onnx" in manifest.files else engines


def open_backend(
    folder: Path,
    manifest: Manifest,
    choice: BackendChoice,
    *,
    threads: int,
    adapters: Sequence[str] | None,
    trust: bool = False,
    own_memory: bool = False,
) -> Opened:
    """Open a verified artifact.

    Args:
      folder: the artifact.
      manifest: of the artifact, verified.
      choice: the backend. ``auto`` chooses the artifact's TensorRT engines where this machine can
        run them, else ONNX Runtime.
      threads: that one operator uses on the CPU.
      adapters: names of the adapters to load; None for all.
      trust: execute code that the artifact brings: its engines, and its native library where it
        differs from the installed one.
      own_memory: copy weights that are mapped from files.

    Raises:
      ArtifactError: the artifact has not been built for the backend or for this GPU, is damaged,
        lacks an adapter, or only code that it brings could run it and is not trusted.
      BackendError: this machine cannot run the backend.
    """
    if choice not in get_args(BackendChoice):
        known = ", ".join(get_args(BackendChoice))
        raise BackendError(f"backend '{choice}': is unknown: choose one of {known}")
    names = listed_adapters(manifest) if adapters is None else list(adapters)
    open_as = partial(
        _open,
        folder,
        manifest,
        threads=threads,
        adapters=names,
        trust=trust,
        own_memory=own_memory,
    )
    for name in names:
        check_adapter_exists(folder, manifest, name)
    built = backends_of(manifest)
    if choice != "auto":
        if choice not in built:
            raise ArtifactError(_not_built(folder, manifest, choice, built))
        return open_as(choice)
    refusal: EoraccError = ArtifactError(_not_built(folder, manifest, "tensorrt", built))
    for tried, backend in enumerate(built):
        if backend == "onnxruntime":
            opened = open_as(backend)
            return replace(opened, fallback_reason=str(refusal)) if tried else opened
        try:
            return open_as(backend)
        except EoraccError as error:
            refusal = refusal if tried else error
    raise refusal


def _not_built(folder: Path, manifest: Manifest, wanted: Backend, built: Sequence[Backend]) -> str:
    if wanted == "tensorrt" and any(name.startswith("tensorrt/") for name in manifest.files):
        return (
            f"{folder}: its target tensorrt has no engine yet: run 'eoracc engine {folder}' on a "
            "machine with TensorRT and an NVIDIA GPU"
        )
    return (
        f"{folder}: has not been built for the backend {wanted}: it has "
        f"{', '.join(built) or 'none that runs'}; add '{wanted}' to 'targets' and build it again"
    )


def _open(
    folder: Path,
    manifest: Manifest,
    backend: Backend,
    *,
    threads: int,
    adapters: Sequence[str],
    trust: bool,
    own_memory: bool,
) -> Opened:
    load = _factors_in(folder, manifest)
    if backend != "onnxruntime":
        decoder = TensorRTDecoder.open(folder / backend, adapters, load, trust=trust)
        device_name = decoder.device_name
        return Opened(backend, device_name, decoder, device_bytes=decoder.device_bytes)
    library = choose_library(folder, manifest, trust=trust)
    files = read_model_files(folder, manifest)
    bank = AdapterBank(find_slots(folder, manifest), adapters, load)
    defaults = ort_values(bank.inputs[1])
    inference = open_inference(
        str(files.model),
        None if library is None else library.path,
        threads,
        str(files.model),
        defaults=defaults,
    )
    if own_memory:
        own_mapped_files(folder)
    graph = Graph(
        inference,
        context_length=files.context_length,
        in_place=files.shares_cache,
        defaults=defaults,
    )
    return Opened(
        backend,
        f"CPU, {threads} threads",
        GraphDecoder(graph, bank),
        library_note=None if library is None else library.note,
    )


def _factors_in(folder: Path, manifest: Manifest) -> FactorsOf:
    """Make a function that gives weighted sums of the adapters of ``folder``.

    Each adapter is read once and kept. The bank asks for every adapter alone while it opens, so
    that later sums come from memory: the folder may hold another artifact by then.
    """
    adapters: dict[str, Adapter] = {}

    def load(weights: Weights) -> Mapping[str, LowRank]:
        for name, _ in weights:
            if name not in adapters:
                adapters[name] = read_listed_adapter(folder, manifest, name)
        if len(weights) == 1 and weights[0][1] == 1:
            return adapters[weights[0][0]].factors
        return combine([(adapters[name], weight) for name, weight in weights], "sum").factors

    return load
