"""Build engines, each in its own process, and cache the finished ones.

A finished engine stays in the work folder under a digest of all that it depends on, so that a build
that was interrupted, or is repeated after a change elsewhere, finds it there.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eoracc.compiler.kept.files import keeping, remove
from eoracc.compiler.kept.folder import KeptFolder
from eoracc.compiler.targets.tensorrt.engines.task import PARTIAL, EngineTask, ShapeRange
from eoracc.errors import TargetError

if TYPE_CHECKING:
    from eoracc.passes.progress import Phase, Progress

__all__ = ["BuiltEngine", "build_engine", "build_engines", "package_version", "require_package"]

_INSTALL = {
    "tensorrt": "pip install 'eoracc[tensorrt]'",
    "tensorrt_rtx": "pip install 'eoracc[tensorrt-rtx]'",
}
_GRACE_SECONDS = 2.0
"""Seconds that a cancelled build may take to stop by itself."""

_LAST_WORDS = 3
"""Number of last lines of a crashed build's output that the error quotes."""


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine.

    Attributes:
      compute_capability: that it was built for; empty for that of the GPU at hand.
      path: the file.
      log: what the builder said.
      summary: version, nodes, layers, constant_bytes, weight_bytes, activation_bytes, size,
        build_s and peak_memory_bytes (:mod:`eoracc.compiler.targets.tensorrt.engines.worker`).
    """

    compute_capability: str
    path: Path
    log: Path
    summary: Mapping[str, Any]


def require_package(package: str) -> None:
    """Check that ``tensorrt_rtx`` or ``tensorrt`` is installed.

    Raises:
      TargetError: it is not; the text says how to install it.
    """
    if util.find_spec(package) is None:
        raise TargetError(f"{package} is not installed: {_INSTALL[package]}")


def package_version(package: str) -> str:
    """Version of an installed package."""
    return metadata.version(package)


def build_engines(
    graph: Path,
    *,
    package: str,
    compute_capabilities: Sequence[str],
    profiles: Sequence[Mapping[str, ShapeRange]],
    work: Path,
    progress: Progress,
) -> list[BuiltEngine]:
    """Build one engine for each compute capability, or take it from ``work``.

    Args:
      graph: the ONNX file, its weights beside it.
      package: the module that builds, ``tensorrt_rtx`` or ``tensorrt``.
      compute_capabilities: of the GPUs.
      profiles: the ranges of every input whose shape is not fixed, per optimization profile.
      work: where finished engines are kept.
      progress: shown one phase an engine.

    Raises:
      TargetError: TensorRT is missing, fails or does not take the graph.
    """
    require_package(package)
    if not work.is_dir():
        remove(work)
    with keeping(work):
        work.mkdir(parents=True, exist_ok=True)
    engines = KeptFolder(work, package)
    depends_on = {
        "graph": _digest(graph),
        "package": [package, package_version(package)],
        "profiles": profiles,
    }
    built = []
    for capability in compute_capabilities:
        content = json.dumps({**depends_on, "compute_capability": capability}, sort_keys=True)
        place = work / hashlib.sha256(content.encode()).hexdigest()[:32]
        task = EngineTask(
            package=package,
            graph=graph,
            engine=place.with_suffix(".engine"),
            log=place.with_suffix(".log"),
            compute_capability=capability,
            profiles=tuple(profiles),
        )
        engine = _kept(task, engines)
        if engine is None:
            engine = build_engine(task, progress)
            files = engines.seal([task.engine.name, task.log.name])
            engines.write(f"{place.name}.json", {"summary": engine.summary, "files": files})
        built.append(engine)
    return built


def _kept(task: EngineTask, engines: KeptFolder) -> BuiltEngine | None:
    """The engine of ``task`` if an earlier build finished it and its files are sound."""
    content = engines.read(f"{task.engine.stem}.json")
    if content is None or not engines.holds(content["files"]):
        for path in (task.engine, task.engine.with_suffix(PARTIAL), task.log):
            remove(path)
        return None
    return BuiltEngine(task.compute_capability, task.engine, task.log, content["summary"])


def build_engine(task: EngineTask, progress: Progress) -> BuiltEngine:
    """Build one engine.

    However this ends early, Ctrl-C included, there is no engine and no process left; the builder's
    log stays.

    Args:
      task: what to build.
      progress: shown one phase, of the builder's own outermost steps.

    Raises:
      TargetError: TensorRT fails or does not take the graph, in its own words.
    """
    capability = task.compute_capability
    where = f"{task.package}, compute capability {capability}" if capability else task.package
    outcome: Mapping[str, Any] | None = None
    with _worker(task) as worker:
        begun = next(worker.events, None)
        if begun is not None and begun["event"] == "phase":
            name = f"engine {capability}".rstrip()
            with progress.phase(name, begun["steps"]) as phase:
                outcome = _follow(worker.events, begun["name"], phase)
        else:
            outcome = begun
        problem = outcome["problem"] if outcome and outcome["event"] == "error" else None
        if outcome is None:
            problem = worker.last_words()
    if problem is not None or outcome is None:
        raise TargetError(f"{where}: {problem}: the builder's log is {task.log}")
    return BuiltEngine(capability, task.engine, task.log, outcome["summary"])


def _follow(
    events: Iterator[Mapping[str, Any]], outermost: str, phase: Phase
) -> Mapping[str, Any] | None:
    """Show the events of a build; the last one, None where the process ended without it."""
    inner = ""
    for event in events:
        if event["event"] == "phase":
            inner = event["name"]
        elif event["event"] == "step":
            if event["name"] == outermost:
                phase.advance(inner)
        else:
            return event
    return None


class _Worker:
    """A running build.

    Attributes:
      events: what it tells, until it ends.
    """

    def __init__(self, task: EngineTask) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eoracc.compiler.targets.tensorrt.engines.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            # Ctrl-C on the terminal reaches this process only, which then stops the builder.
            start_new_session=True,
        )
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        self._stdin = self._process.stdin
        self.events: Iterator[Mapping[str, Any]] = map(json.loads, self._process.stdout)
        # A process that has died already shows by the end of its events.
        with suppress(BrokenPipeError):
            self._stdin.write(task.to_json() + "\n")
            self._stdin.flush()

    def last_words(self) -> str:
        """The reason for a premature end of the events."""
        status = self._process.wait()
        self._printed.seek(0)
        lines = self._printed.read().decode(errors="replace").split("\n")
        said = " ".join(line.strip() for line in lines[-_LAST_WORDS:] if line.strip())
        return f"the builder ended with status {status}{said and f' ({said})'}"

    def end(self) -> None:
        """Cancel a running build: close its input, and kill it if it does not stop."""
        with self._process, self._printed:
            with suppress(BrokenPipeError):
                self._stdin.close()
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()


@contextmanager
def _worker(task: EngineTask) -> Iterator[_Worker]:
    """The building process; it ends with the context."""
    worker = _Worker(task)
    try:
        yield worker
    finally:
        worker.end()
        task.engine.with_suffix(PARTIAL).unlink(missing_ok=True)


def _digest(graph: Path) -> str:
    """sha256 over the graph and the weights beside it, hexadecimal."""
    digest = hashlib.sha256()
    for path in (graph, graph.with_name(f"{graph.name}.data")):
        if path.exists():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
