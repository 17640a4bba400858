"""Load ``eoracc serve`` for an hour with all that a server meets, and count what goes wrong.

    python -m benchmarks.soak ARTIFACT [--minutes 60] [--clients 8] [--rows 4] [--threads 1]
                              [--seed N] [--json FILE]

The server runs in a process of its own, on a copy of the artifact. Clients ask for texts, streams,
chats, adapters and new sums of adapters; some leave in the middle, and some send what must be
refused. Meanwhile the folder under the server is built again, loses and gets adapters, is
overwritten and removed. Greedy answers are compared with those of the idle server: int8 artifacts
(``accuracy_level: 4``) with at most eight rows give the same to the bit.

The table has, for each kind of request, how many were sent, how many the server refused for now
(429, 503), failures, and percentiles of the latency. An answer is lost if its connection broke or
its stream did not end. The memory is the server's resident set, after a tenth of the time, at the
end and at its largest, with the slope of a line through the rest of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import httpx
import numpy as np

from benchmarks.machine import describe_machine, machine_line
from benchmarks.serving import free_port
from benchmarks.soak_clients import KINDS, Clients, Outcome
from eoracc.runtime.adapters.files import adapter_names
from eoracc.runtime.adapters.store import remove_adapter

WEIGHTS = {"whole": 6, "streamed": 6, "cancelled": 3, "odd": 3, "summed": 2}
"""How often a kind is drawn; others once."""

READY_S = 120
TIMEOUT_S = 120
CHANGE_S = 15.0
SAMPLE_S = 1.0
WARM_UP = 0.1
"""Share of the time in which caches fill."""


@dataclass(frozen=True)
class KindFigures:
    """Figures of one kind of request; percentiles are None where nothing was measured."""

    kind: str
    requests: int
    busy: int
    failures: Mapping[str, int]
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Memory:
    """Resident memory of the server in bytes; ``slope`` is its growth per hour."""

    start: int
    end: int
    peak: int
    slope: float


@dataclass(frozen=True)
class Soak:
    """The figures of a whole run.

    Attributes:
      seconds: that it took.
      kinds: figures of each kind of request.
      requests: of all kinds.
      lost: answers that did not arrive.
      wrong: greedy answers that differ from those of the idle server.
      failures: of all kinds, those two included.
      tokens_per_s: tokens of all answers that arrived, per second.
      memory: of the server.
      changes: of the folder under it, by kind.
      traces: lines of its log with a trace.
      exit_code: after SIGTERM.
    """

    seconds: float
    kinds: Sequence[KindFigures]
    requests: int
    lost: int
    wrong: int
    failures: int
    tokens_per_s: float
    memory: Memory
    changes: Mapping[str, int]
    traces: int
    exit_code: int


def figures_of(kind: str, outcomes: Sequence[Outcome]) -> KindFigures:
    """Figures of the outcomes of one kind."""
    times = [outcome.latency_ms for outcome in outcomes if outcome.latency_ms is not None]
    p50, p99 = np.percentile(times, (50, 99)).tolist() if times else (None, None)
    failures = Counter(outcome.failure for outcome in outcomes if outcome.failure is not None)
    busy = sum(outcome.busy for outcome in outcomes)
    return KindFigures(kind, len(outcomes), busy, dict(failures), p50, p99)


def memory_of(samples: Sequence[tuple[float, int]], peak: int) -> Memory:
    """Figures of samples of the resident set: seconds since the start, and bytes.

    Samples of the first tenth of the time are left out.
    """
    last = samples[-1][0]
    settled = [sample for sample in samples if sample[0] >= WARM_UP * last]
    times, sizes = np.array(settled, np.float64).T
    slope = 3600 * float(np.polyfit(times, sizes, 1)[0]) if len(settled) > 1 else 0.0
    return Memory(settled[0][1], settled[-1][1], peak, slope)


def table_of(soak: Soak) -> str:
    """The figures for people."""
    heading = ("kind", "requests", "busy", "failures", "p50 ms", "p99 ms")
    rows = [
        (
            line.kind,
            f"{line.requests}",
            f"{line.busy}",
            f"{sum(line.failures.values())}",
            "-" if line.p50_ms is None else f"{line.p50_ms:.1f}",
            "-" if line.p99_ms is None else f"{line.p99_ms:.1f}",
        )
        for line in soak.kinds
    ]
    lines = ["  ".join(f"{cell:>9}" for cell in row) for row in (heading, *rows)]
    start, end, peak, slope = (value / 2**20 for value in astuple(soak.memory))
    changes = ", ".join(f"{name} {count}" for name, count in soak.changes.items())
    faults = f"{soak.lost} lost, {soak.wrong} wrong, {soak.traces} traces in the log"
    lines += [
        "",
        f"{soak.requests} requests in {soak.seconds:.0f} s, {soak.tokens_per_s:.1f} tokens/s",
        f"{soak.failures} failures: {faults}, exit code {soak.exit_code}",
        f"memory {start:.1f} MiB, at the end {end:.1f}, at most {peak:.1f}, {slope:+.2f} an hour",
        f"changes of the folder: {changes}",
    ]
    for line in soak.kinds:
        lines += [f"{line.kind}: {count} x {text}" for text, count in line.failures.items()]
    return "\n".join(lines)


# --- the folder under the server ------------------------------------------------------------------


def build_again(folder: Path, original: Path) -> None:
    """Put another folder in the place of this one."""
    new, old = folder.with_name("new"), folder.with_name("old")
    shutil.copytree(original, new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def overwrite(folder: Path, original: Path) -> None:
    """Write every file again, in place, the weights with other numbers."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    for path in folder.glob("*.data"):
        path.write_bytes(bytes(path.stat().st_size))


def remove_one_adapter(folder: Path, original: Path) -> None:
    """Remove an adapter from a sound folder."""
    build_again(folder, original)
    for name in adapter_names(folder)[:1]:
        remove_adapter(folder, name)


def delete(folder: Path, original: Path) -> None:
    """Remove the folder."""
    del original
    shutil.rmtree(folder, ignore_errors=True)


CHANGES: tuple[Callable[[Path, Path], None], ...] = (
    build_again,
    remove_one_adapter,
    overwrite,
    delete,
)


async def change_folder(folder: Path, original: Path, seconds: float) -> dict[str, int]:
    """Change the folder in turn until ``seconds`` have passed; how often each change was made."""
    made: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(CHANGE_S, left))
        change = CHANGES[made.total() % len(CHANGES)]
        await asyncio.to_thread(change, folder, original)
        made[change.__name__] += 1
    return dict(made)


# --- the server -----------------------------------------------------------------------------------


@contextmanager
def serving(
    folder: Path, log: Path, options: argparse.Namespace
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server on ``folder``; yield its URL and process once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(folder), "--port"]
    command += [str(port), "--rows", str(options.rows), "--threads", str(options.threads)]
    command += ["--log-format", "json"]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stderr=stream)
        try:
            end = time.monotonic() + READY_S
            while True:
                with suppress(httpx.TransportError):
                    httpx.get(f"{url}/health")
                    break
                if child.poll() is not None or time.monotonic() > end:
                    raise SystemExit(log.read_text(encoding="utf-8")[-2000:])
                time.sleep(0.1)
            yield url, child
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()


def memory_field(pid: int, field: str) -> int:
    """A field of Linux's /proc/PID/status in bytes; 0 once the process has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


async def sample_memory(pid: int, seconds: float) -> list[tuple[float, int]]:
    """Seconds since the start and the resident bytes of a process, for ``seconds``."""
    begin, samples = time.monotonic(), []
    while (now := time.monotonic() - begin) < seconds:
        samples.append((now, memory_field(pid, "VmRSS")))
        await asyncio.sleep(SAMPLE_S)
    return samples


async def load(
    url: str, pid: int, folder: Path, original: Path, options: argparse.Namespace
) -> tuple[list[Outcome], list[tuple[float, int]], dict[str, int], float]:
    """Outcomes, samples of memory, changes, and the seconds that all took."""
    seconds = 60 * options.minutes
    kinds = [kind for kind in KINDS for _ in range(WEIGHTS.get(kind, 1))]
    outcomes: list[Outcome] = []
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client:
        clients = Clients(client, adapter_names(original), options.seed)
        await clients.learn()
        begin = time.monotonic()

        async def work(number: int) -> None:
            rng = np.random.default_rng((options.seed, number))
            while time.monotonic() - begin < seconds:
                outcomes.append(await clients.send(kinds[int(rng.integers(len(kinds)))]))

        async with asyncio.TaskGroup() as group:
            samples = group.create_task(sample_memory(pid, seconds))
            changes = group.create_task(change_folder(folder, original, seconds))
            for number in range(options.clients):
                group.create_task(work(number))
        return outcomes, samples.result(), changes.result(), time.monotonic() - begin


def run(options: argparse.Namespace) -> Soak:
    """Serve a copy of the artifact and load it."""
    with tempfile.TemporaryDirectory() as work:
        original, folder = Path(work) / "original", Path(work) / "artifact"
        log = Path(work) / "log"
        shutil.copytree(options.artifact, original)
        shutil.copytree(original, folder)
        with serving(folder, log, options) as (url, child):
            outcomes, samples, changes, seconds = asyncio.run(
                load(url, child.pid, folder, original, options)
            )
            peak = memory_field(child.pid, "VmHWM")
            child.send_signal(signal.SIGTERM)
            exit_code = child.wait(READY_S)
        traces = log.read_text(encoding="utf-8").count("Traceback")
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_kind[outcome.kind].append(outcome)
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    return Soak(
        seconds=seconds,
        kinds=[figures_of(kind, by_kind[kind]) for kind in KINDS],
        requests=len(outcomes),
        lost=sum(failure.startswith("lost") for failure in failures),
        wrong=failures.count("wrong answer"),
        failures=len(failures),
        tokens_per_s=sum(outcome.tokens for outcome in outcomes) / seconds,
        memory=memory_of(samples, peak),
        changes=changes,
        traces=traces,
        exit_code=exit_code,
    )


def main() -> None:
    """Run, print the table, and write JSON if a file is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    soak = run(options)
    print(f"{machine_line()}\n")
    print(table_of(soak))
    if options.json:
        content = {
            "machine": describe_machine(),
            "options": {key: str(value) for key, value in vars(options).items()},
            "figures": asdict(soak),
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
