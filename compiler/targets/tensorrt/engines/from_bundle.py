"""Build an engine from a bundle, on the machine that has TensorRT and the GPU."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.compiler.targets.tensorrt.engines.bindings import profile_shapes
from eoracc.compiler.targets.tensorrt.engines.build import build_engine, require_package
from eoracc.compiler.targets.tensorrt.engines.bundle import BUNDLE_FOLDER, Bundle, open_bundle
from eoracc.compiler.targets.tensorrt.engines.task import EngineTask
from eoracc.errors import ArtifactError, TargetError
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.folder_change import change_files, changing
from eoracc.runtime.artifact.manifest import describe_bytes, locked_artifact, read_manifest
from eoracc.runtime.artifact.staged_folder import staged_folder
from eoracc.runtime.artifact.update import change_artifact
from eoracc.runtime.tensorrt.cuda import open_device
from eoracc.runtime.tensorrt.engine_set import (
    ENGINES_FILE,
    EngineFile,
    EngineSet,
    read_engine_set,
)

if TYPE_CHECKING:
    from eoracc.passes.progress import Progress

__all__ = ["OLDEST_TENSORRT", "MadeEngine", "build_from_bundle", "store_engine"]

OLDEST_TENSORRT = (10, 9)
"""The first version that accepts Python plugins with kernels compiled ahead of time."""

_PACKAGE = "tensorrt"
_LOG = "builder-sm{}.log"


@dataclass(frozen=True)
class MadeEngine:
    """An engine, in its place.

    Attributes:
      path: the file; engines.json stands beside it.
      compute_capability: of the GPU that it was built on and for.
      device: the GPU's name.
      summary: see :class:`eoracc.compiler.targets.tensorrt.engines.build.BuiltEngine`.
    """

    path: Path
    compute_capability: str
    device: str
    summary: Mapping[str, Any]


def build_from_bundle(
    path: Path,
    *,
    progress: Progress,
    compute_capability: str | None = None,
    output: Path | None = None,
    force: bool = False,
    trust: bool = False,
    authenticity: Authenticity = UNCHECKED,
) -> MadeEngine:
    """Build the engine for the GPU of this machine.

    Args:
      path: an artifact, or its bundle.
      progress: shown one phase.
      compute_capability: that the GPU is expected to have; None takes any.
      output: a folder for the engine and engines.json, made where there is none; None puts them
        into the bundle, and into its artifact's manifest.
      force: replace an engine for this GPU that is there.
      trust: let the GPU execute the kernels that the bundle brings, which TensorRT times.
      authenticity: what the artifact has to be; a bundle alone has no manifest.

    Raises:
      ArtifactError: the bundle is damaged, not the one asked for, not trusted, or has such an
        engine already.
      TargetError: TensorRT is missing or too old, the GPU is another one, or no engine comes of it.
      BackendError: there is no driver, or no GPU.
    """
    bundle = open_bundle(path, authenticity)
    _require_tensorrt()
    device = open_device()
    capability = device.compute_capability
    if compute_capability not in (None, capability):
        raise TargetError(
            f"the GPU here, {device.name}, has compute capability {capability}, not "
            f"{compute_capability}: TensorRT builds for the GPU at hand; CUDA_VISIBLE_DEVICES "
            "chooses another one"
        )
    folder = bundle.folder if output is None else output.absolute()
    known = _known_engines(folder, bundle, force=force, capability=capability)
    if not trust:
        raise ArtifactError(
            f"{bundle.folder}: brings kernels of the bundle's builder, which the GPU would execute "
            "to time them: add --trust if you trust the builder"
        )
    place = Path(tempfile.gettempdir()) / "eoracc-engine"
    # The text of a TargetError names the log, which stays until the next engine is built.
    with staged_folder(place, kept=TargetError) as work:
        task = EngineTask(
            package=_PACKAGE,
            graph=bundle.folder / bundle.engines.graph,
            engine=work / "new.engine",
            log=work / "builder.log",
            compute_capability="",
            profiles=tuple(
                profile_shapes(bundle.engines.bindings, profile)
                for profile in bundle.engines.profiles
            ),
            plugin_capability=capability,
        )
        with _locked(bundle):
            built = build_engine(task, progress)
        stored = store_engine(
            bundle,
            output,
            known,
            capability=capability,
            engine=built.path.read_bytes(),
            log=built.log.read_bytes(),
            version=str(built.summary["version"]),
        )
    return MadeEngine(stored, capability, device.name, built.summary)


def _locked(bundle: Bundle) -> AbstractContextManager[None]:
    """Lock the artifact that the bundle is part of; it must still be the one that was checked."""
    if bundle.artifact is None or bundle.backbone is None:
        return nullcontext()
    return locked_artifact(bundle.artifact, bundle.backbone)


def _require_tensorrt() -> None:
    """Check that TensorRT is installed and recent enough."""
    require_package(_PACKAGE)
    version = metadata.version(_PACKAGE)
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise TargetError(
            f"tensorrt {version} is installed, which takes no plugins that are compiled ahead of "
            f"time: pip install --upgrade 'tensorrt>={oldest}'"
        )


def _known_engines(
    folder: Path, bundle: Bundle, *, force: bool, capability: str
) -> EngineSet | None:
    """The engines that exist already; None for none."""
    if not (folder / ENGINES_FILE).is_file():
        return None
    known = read_engine_set(folder)
    if replace(known, engines=(), version="") != replace(bundle.engines, engines=(), version=""):
        raise ArtifactError(f"{folder}: holds engines of another bundle: give another folder")
    if capability in known.compute_capabilities and not force:
        raise ArtifactError(
            f"{folder}: has an engine for compute capability {capability}: replace it with --force"
        )
    return known


def store_engine(
    bundle: Bundle,
    output: Path | None,
    known: EngineSet | None,
    *,
    capability: str,
    engine: bytes,
    log: bytes,
    version: str,
) -> Path:
    """Move an engine, engines.json and the builder's log into place, all of them or none.

    Args:
      bundle: that it was built from.
      output: another folder for it; None for the bundle, and its artifact's manifest.
      known: engines that are there; those of another version of TensorRT are forgotten.
      capability: of the GPU.
      engine: the file's content.
      log: what the builder said.
      version: of TensorRT.

    Returns:
      The engine's path.

    Raises:
      ArtifactError: the folder cannot be written to.
    """
    number = capability.replace(".", "")
    name = f"sm{number}.engine"
    entry = describe_bytes(engine)
    others = [] if known is None or known.version != version else list(known.engines)
    engines = [engine for engine in others if engine.compute_capability != capability]
    engines.append(EngineFile(capability, name, entry.sha256, entry.size))
    engines.sort(key=lambda engine: tuple(map(int, engine.compute_capability.split("."))))
    described = replace(bundle.engines, version=version, engines=tuple(engines))
    written = {
        name: engine,
        _LOG.format(number): log,
        ENGINES_FILE: described.to_json().encode(),
    }
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    folder = output or (bundle.folder if bundle.artifact is None else bundle.artifact)
    kept = {engine.file for engine in engines}
    stale = (
        []
        if known is None
        else [engine.file for engine in known.engines if engine.file not in kept]
    )
    if output is None and bundle.artifact is not None:
        written = {f"{BUNDLE_FOLDER}/{key}": content for key, content in written.items()}
        stale = [f"{BUNDLE_FOLDER}/{key}" for key in stale]
    with changing(folder):
        if output is None and bundle.artifact is not None:
            manifest = read_manifest(folder)
            if manifest.digest != bundle.backbone:
                raise ArtifactError(
                    f"{folder}: was replaced by another artifact meanwhile: run the command again"
                )
            change_artifact(folder, manifest, written, stale)
        else:
            change_files(folder, written, stale)
    return (output or bundle.folder) / name
