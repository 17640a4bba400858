"""The process that has TensorRT loaded and builds one engine: ``python -m …engines.worker``.

TensorRT has one logger a process, holds on to its memory, and answers some graphs with an abort; in
the middle of a build it may also not ask for a long time whether to go on. So each build has a
process of its own, which the caller can end at any time.

The first line of standard input is an
:class:`~eoracc.compiler.targets.tensorrt.engines.task.EngineTask`; the end of standard input, which
the caller's own end brings too, cancels the build. Each line of standard output is an event::

    {"event": "phase", "name": "Building engine", "parent": null, "steps": 6}
    {"event": "step", "name": "Building engine"}
    {"event": "done", "summary": {...}}
    {"event": "error", "problem": "..."}
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from types import ModuleType
from typing import Any, TextIO

from eoracc.compiler.targets.tensorrt.engines.layers import read_layers
from eoracc.compiler.targets.tensorrt.engines.task import PARTIAL, EngineTask, parse_task
from eoracc.plugins.tensorrt.plugin import register
from eoracc.runtime.memory import peak_bytes

__all__ = ["CANCELLED", "build_engine", "main"]

CANCELLED = 3
"""Exit status of a build that was cancelled."""

_Send = Callable[[dict[str, Any]], None]


class _RefusalError(Exception):
    """TensorRT refuses to build this; the text is its reason."""


def build_engine(task: EngineTask, send: _Send, cancelled: Callable[[], bool]) -> bool:
    """Build the engine of ``task``.

    Args:
      task: what to build.
      send: takes the events.
      cancelled: asked between two steps.

    Returns:
      Whether there is an engine: not where the build was cancelled.
    """
    begun = time.perf_counter()
    messages: list[str] = []
    try:
        trt = _import(task.package)
        if task.plugin_capability:
            _register_plugin(task)
        with task.log.open("w", encoding="utf-8") as log:
            plan, nodes = _build(trt, task, log, messages, _monitor(trt, send, cancelled))
    except _RefusalError as refusal:
        if not cancelled():
            send({"event": "error", "problem": str(refusal)})
        return False
    partial = task.engine.with_suffix(PARTIAL)
    partial.write_bytes(plan)
    partial.rename(task.engine)
    summary = {
        "version": str(trt.__version__),
        "nodes": nodes,
        **asdict(read_layers(messages)),
        "size": plan.nbytes,
        "build_s": round(time.perf_counter() - begun, 2),
        "peak_memory_bytes": peak_bytes(),
    }
    send({"event": "done", "summary": summary})
    return True


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        raise _RefusalError(f"cannot be loaded ({error})") from error


def _register_plugin(task: EngineTask) -> None:
    try:
        register(task.graph.parent, task.plugin_capability)
    except ValueError as error:
        raise _RefusalError(str(error)) from error


def _build(
    trt: Any,  # noqa: ANN401 - tensorrt or tensorrt_rtx
    task: EngineTask,
    log: TextIO,
    messages: list[str],
    monitor: Any,  # noqa: ANN401 - an IProgressMonitor
) -> tuple[memoryview, int]:
    """The serialized engine, and how many layers the network had before."""
    errors: list[str] = []
    logger = _logger(trt, log, messages, errors)
    builder = trt.Builder(logger)
    if builder is None:
        raise _RefusalError(_reason(errors))
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(task.graph)):
        raise _RefusalError(_parser_reason(parser))
    config = builder.create_builder_config()
    config.progress_monitor = monitor
    # So that the log lists the layers; the engine does not grow by it.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if task.compute_capability:
        name = f"SM{task.compute_capability.replace('.', '')}"
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
    for ranges in task.profiles:
        profile = builder.create_optimization_profile()
        for binding, shapes in ranges.items():
            profile.set_shape(binding, *shapes)
        config.add_optimization_profile(profile)
    nodes = network.num_layers
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _RefusalError(_reason(errors))
    return memoryview(plan), nodes


def _logger(trt: Any, log: TextIO, messages: list[str], errors: list[str]) -> Any:  # noqa: ANN401
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401 - of TensorRT
            messages.append(message)
            if severity == trt.ILogger.VERBOSE:
                return
            log.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    return Logger()


def _monitor(trt: Any, send: _Send, cancelled: Callable[[], bool]) -> Any:  # noqa: ANN401
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            send({"event": "phase", "name": phase_name, "parent": parent_phase, "steps": num_steps})

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step
            send({"event": "step", "name": phase_name})
            return not cancelled()

    return Monitor()


def _parser_reason(parser: Any) -> str:  # noqa: ANN401 - an OnnxParser
    """The parser's message on the first node that it does not support."""
    if not parser.num_errors:
        return "the graph cannot be read"
    error = parser.get_error(0)
    node = f"node {error.node_name()} ({error.node_operator()}): " if error.node_name() else ""
    return f"{node}{_one_line(error.desc())}"


def _reason(errors: Iterable[str]) -> str:
    """The builder's last message; earlier ones are mostly attempts."""
    return _one_line(next(reversed(list(errors)), "no engine came of it"))


def _one_line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def main() -> int:
    """Build the engine of the task on standard input."""
    task = parse_task(sys.stdin.readline())
    # Libraries print to standard output; the events use a private copy of it.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    stop = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    built = build_engine(task, send, stop.is_set)
    return 0 if built else CANCELLED if stop.is_set() else 1


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    # Not sys.exit, which would wait for the thread that reads standard input.
    os._exit(status)
