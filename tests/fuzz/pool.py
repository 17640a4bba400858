"""Run cases in processes of their own, so that a signal, a hang or a leak is seen and survived.

The processes are forked from a server that has imported what readers need and has started no
thread. Each runs one case after another; one that dies or hangs is replaced.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

from typing_extensions import override

from tests.fuzz.kinds import FAULTY, KINDS, Kind
from tests.fuzz.mutations import FORMS, Random, replace_file
from tests.fuzz.readers import use_templates
from tests.fuzz.replies import Reply

__all__ = ["FAULTS", "HANG_S", "Case", "Outcome", "run_cases"]

FAULTS = ("traceback", "unclear", "hang", "signal", "memory", "lie", "noise")
"""Verdicts that are faults of eoracc."""

HANG_S = 20.0
"""Of processor time, or of wall time without any: a busy machine slows all cases down."""

_ADDRESS_BYTES = 6 << 30
"""Address space beyond that of a process which has imported everything."""

_FILE_BYTES = 1 << 30
_PEAK_BYTES = 1 << 28
"""Growth of a process's peak memory; files of cases have some kilobytes."""

_NOISE_BYTES = 20_000
"""Written past the command line by libraries in C."""

_PRELOADED = ["tests.fuzz.preload"]


@dataclass(frozen=True)
class Case:
    """One changed file.

    Attributes:
      kind: name of its kind.
      number: in its kind; with the run's seed it decides everything.
    """

    kind: str
    number: int

    @override
    def __str__(self) -> str:
        return f"{self.kind}:{self.number}"


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      case: the case.
      verdict: ``accepted``, ``refused``, or one of :data:`FAULTS`.
      detail: the sentence, the trace, or the signal.
      seconds: of wall time.
    """

    case: Case
    verdict: str
    detail: str = ""
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    case: Case | None = None
    started_s: float = 0.0
    cpu_before_s: float = 0.0
    cpu_s: float = 0.0
    moved_s: float = 0.0


def run_cases(
    templates: Path,
    work: Path,
    cases: Sequence[Case],
    *,
    seed: int,
    workers: int = 1,
    hang_s: float = HANG_S,
) -> Iterator[Outcome]:
    """Run ``cases``, some at a time.

    Args:
      templates: of :func:`tests.fuzz.templates.write_templates`.
      work: an empty folder on the same file system.
      cases: to run.
      seed: of the run.
      workers: number of processes.
      hang_s: processor time that no case may take, and wall time that none may sleep.

    Yields:
      Outcomes as they come.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    pending = list(reversed(cases))
    running: list[_Worker] = []

    def start(index: int) -> _Worker:
        ours, theirs = context.Pipe()
        arguments = (theirs, templates, work / f"worker{index}", seed)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def feed(worker: _Worker) -> None:
        worker.case = pending.pop() if pending else None
        worker.started_s = worker.moved_s = time.monotonic()
        worker.cpu_s = worker.cpu_before_s = _cpu_s(worker.process.pid)
        if worker.case is not None:
            worker.pipe.send(worker.case)

    try:
        for index in range(workers):
            running.append(start(index))
            feed(running[index])
        while any(worker.case for worker in running):
            connection.wait([worker.pipe for worker in running if worker.case], timeout=0.5)
            for index, worker in enumerate(running):
                if worker.case is None:
                    continue
                outcome = _outcome(worker, hang_s)
                if outcome is None:
                    continue
                yield outcome
                if not worker.process.is_alive() or outcome.verdict in ("hang", "signal"):
                    worker.process.kill()
                    worker.process.join()
                    running[index] = start(index)
                feed(running[index])
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()


def _outcome(worker: _Worker, hang_s: float) -> Outcome | None:
    """The end of a worker's case; None while it runs."""
    assert worker.case is not None
    seconds = time.monotonic() - worker.started_s
    if worker.pipe.poll():
        try:
            verdict, detail = worker.pipe.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            name = signal.Signals(-code).name if code and code < 0 else f"exit {code}"
            return Outcome(worker.case, "signal", name, seconds)
        return Outcome(worker.case, verdict, detail, seconds)
    now_s = _cpu_s(worker.process.pid)
    if now_s > worker.cpu_s:
        worker.cpu_s, worker.moved_s = now_s, time.monotonic()
    slept_s = time.monotonic() - worker.moved_s
    busy_s = worker.cpu_s - worker.cpu_before_s
    if busy_s > hang_s or slept_s > hang_s:
        return Outcome(worker.case, "hang", f"{busy_s:.1f} s of processor time", seconds)
    return None


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far, in seconds."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- in a worker ----------------------------------------------------------------------------------


def _serve(pipe: connection.Connection, templates: Path, work: Path, seed: int) -> None:
    work.mkdir(exist_ok=True)
    noise = work / "noise"
    os.dup2(os.open(noise, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), 2)
    _limit()
    use_templates(templates)
    while True:
        case: Case = pipe.recv()
        before = _reset_peak()
        os.truncate(noise, 0)
        verdict, detail = _run(case, templates, work / "case", seed)
        if (peak := _peak_bytes() - before) > _PEAK_BYTES:
            verdict, detail = "memory", f"{peak >> 20} MB: {detail}"
        if noise.stat().st_size > _NOISE_BYTES:
            verdict, detail = "noise", noise.read_text(errors="replace")[:2000]
        pipe.send((verdict, detail))


def _limit() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESS_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reset_peak() -> int:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def _run(case: Case, templates: Path, folder: Path, seed: int) -> tuple[str, str]:
    kind = (KINDS | FAULTY)[case.kind]
    rng = Random(f"{seed} {case}")
    shutil.rmtree(folder, ignore_errors=True)
    for name in (kind.folder, *kind.others):
        shutil.copytree(templates / name, folder / name, copy_function=_copy)
    sealed = _mutate(kind, folder / kind.folder, rng)
    try:
        reply = kind.read(folder, rng)
    except BaseException as error:  # noqa: BLE001 - panics of Rust are no Exception
        return "traceback", "".join(traceback.format_exception(error))
    if reply.verdict == "accepted" and kind.listed and not sealed:
        return _check_refusal(kind, folder, templates, reply)
    return reply.verdict, reply.trace or reply.text


def _copy(source: str, target: str) -> None:
    """Link what is large and never changed; onnx refuses weights with several links."""
    if source.endswith(".so"):
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


def _mutate(kind: Kind, folder: Path, rng: Random) -> bool:
    """Change the file; returns whether the manifest was written again to fit it."""
    path = folder / kind.file
    if kind.form != "body" and rng.random() < 0.05:
        replace_file(rng, path)
        return False
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(FORMS[kind.form](rng, content))
    if kind.listed and rng.random() < 0.8:
        _seal(folder)
        return True
    return False


def _seal(folder: Path) -> None:
    """Write the manifest of what is there, as whoever changes a file with intent would."""
    from hashlib import sha256

    from eoracc.runtime.artifact.manifest import Manifest, describe_folder, read_manifest

    description = folder / "adapters" / "math.json"
    factors = folder / "adapters" / "math.onnx_adapter"
    with suppress(ValueError, TypeError, RecursionError):
        content = json.loads(description.read_bytes())
        content["sha256"] = sha256(factors.read_bytes()).hexdigest()
        text = json.dumps(content)
        description.unlink()
        description.write_text(text)
    old = read_manifest(folder)
    sections = {name: getattr(old, name) for name in ("source", "config", "packages", "parity")}
    manifest = Manifest.of(describe_folder(folder), **sections)
    path = folder / "manifest.json"
    path.unlink()
    path.write_text(manifest.to_json())


def _check_refusal(kind: Kind, folder: Path, templates: Path, reply: Reply) -> tuple[str, str]:
    """An artifact whose files are not its manifest's must be refused by ``verify``."""
    from tests.fuzz.replies import command

    path = folder / kind.folder / kind.file
    sound = templates / kind.folder / kind.file
    # A command may also have removed the file, as its manifest says.
    if not path.is_file() or path.read_bytes() == sound.read_bytes():
        return reply.verdict, reply.text
    if command("verify", folder / kind.folder).exit_code == 0:
        return "lie", "verify accepts a file that is not the manifest's"
    return reply.verdict, reply.text
