"""Time whole models against onnxruntime-genai int4 and llama.cpp, in one interleaved run.

    python benchmarks/decode.py --artifact smollm2=DIR [--artifact gemma3=DIR ...] [--json FILE]
                                [--before smollm2=DIR ...] [--alone]
                                [--llama-python PYTHON] [--rounds N] [--threads N]

Every engine runs in a process of its own (``engines.py``) and is idle while another one is timed.
In each round every engine decodes some tokens after a short prompt, and processes a prompt of 512
tokens. The time of a step is the median of its turn. The peers' own tools make the peers' models
once from the same checkpoint, in ``.cache/decode``. llama.cpp can be installed in another
environment: llama-cpp-python is a source package, and GCC 12 needs
``CMAKE_ARGS="-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"`` on a processor with AMX, because its
header does not declare that a tile configuration is read.

:data:`BARS` holds the bars: a ratio to the fastest peer, with no more bytes of weights. An engine
that cannot run is listed, and its bars stay open. An artifact of an earlier version, ``--before``,
is timed with the others and has bars of its own, :data:`BEFORE_BARS`. Peak memory is that of the
processes once they have loaded and decoded, before the prompt of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
import onnx_ir as ir

# A script that runs by its path can import from its own folder only.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.bandwidth import Reader
from benchmarks.machine import machine_line
from benchmarks.rows import Row, compare, show, write_json
from eoracc.compiler.frontend.load import load
from examples.gemma3 import fetch as gemma3
from examples.packages import assemble
from examples.smollm2 import fetch as smollm2

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "decode"
ENGINES = Path(__file__).with_name("engines.py")
PEER_MODELS = Path(__file__).with_name("peer_models.py")

MODELS = {
    "smollm2": ("SmolLM2-135M", smollm2.MODEL, smollm2.DATA),
    "gemma3": ("Gemma-3-270M", gemma3.MODEL, gemma3.DATA),
}
GENAI_BLOCK_SIZES = (32, 128)
GGUF_TYPES = ("Q4_0", "Q3_K_M")

DECODE, PREFILL = "decode", "prefill"
TOKENS = {DECODE: 64, PREFILL: 512}
BARS = {DECODE: 1 / 1.5, PREFILL: 1 / 1.2}
"""Our time divided by the fastest peer's: 1.5 times as fast in decoding, 1.2 times in prefill."""

BEFORE_BARS = {DECODE: 1 / 1.9, "peak memory": 0.6}
"""Those against an artifact of an earlier version: its default build of the same model."""

SPIN_S = 0.2
"""Threads spin for some time after their work; no other engine is timed meanwhile."""

_LOOK_UPS = {"Gather", "GatherNBits", "GatherBlockQuantized", "GroupQueryAttention"}
"""Operators that read a few rows of a table, not all of it."""


class MissingError(Exception):
    """An engine cannot run on this machine."""


@dataclass(frozen=True)
class Engine:
    """One engine to run: its kind in ``engines.py``, its model, and whether it is ours.

    One ``before`` is an artifact of an earlier version, which ours is compared with.
    """

    label: str
    kind: str
    path: Path
    python: str = sys.executable
    ours: bool = False
    before: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a step reads."""
        if self.kind == "genai":
            return onnx_bytes(self.path / "model.onnx")
        return gguf_bytes(self.path)


def onnx_bytes(path: Path) -> int:
    """Bytes of the initializers that a decoding step reads as a whole.

    Tables from which an operator only gathers rows (embeddings, rotary angles) are left out, unless
    another operator also reads them, such as a tied head.
    """
    model = ir.load(path)
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and any(node.op_type not in _LOOK_UPS for node in value.consumers())
    )


def gguf_bytes(path: Path) -> int:
    """Bytes of the tensors that a decoding step reads as a whole: all but an untied embedding."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    if "output.weight" in sizes:
        sizes.pop("token_embd.weight")
    return sum(sizes.values())


class Worker:
    """An engine's process."""

    def __init__(self, engine: Engine, threads: int) -> None:
        command = [engine.python, ENGINES, engine.kind, engine.path, "--threads", str(threads)]
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        answer = self._answer()
        if "ready" not in answer:
            self.close()
            raise MissingError(answer.get("missing", f"{engine.python} ends without an answer"))
        self.version: str = answer["ready"]
        self.decoding_bytes: int | None = None

    def seconds(self, measure: str) -> float:
        """Median seconds of one step of ``measure``."""
        request = {"measure": measure, "tokens": TOKENS[measure]}
        stdin: IO[str] = self._process.stdin  # type: ignore[assignment]
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise MissingError(f"ended with code {self._process.wait()}") from None
        answer = self._answer()
        if "seconds" not in answer:
            raise MissingError(f"ended with code {self._process.wait()} during {measure}")
        if measure == DECODE and self.decoding_bytes is None:
            self.decoding_bytes = self._peak_bytes()
        return float(np.median(answer["seconds"]))

    def _peak_bytes(self) -> int | None:
        """Largest memory that the process has used; None where Linux does not say."""
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    def _answer(self) -> dict[str, Any]:
        stdout: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = stdout.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def running(engine: Engine, threads: int) -> Iterator[Worker]:
    """A worker that has run every measurement once.

    Raises:
      MissingError: the engine cannot run.
    """
    worker = Worker(engine, threads)
    try:
        for measure in TOKENS:
            worker.seconds(measure)
        yield worker
    finally:
        worker.close()


# --- models ---------------------------------------------------------------------------------------


def peers(name: str, llama_python: str, missing: dict[str, str]) -> list[Engine]:
    """The peers' models of a checkpoint; missing ones are made."""
    _, source, data = MODELS[name]
    (checkpoint,) = assemble([source], data)
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    engines = []
    for size in GENAI_BLOCK_SIZES:
        engine = Engine(f"genai int4 block {size}", "genai", folder / f"genai-int4-{size}")
        if not (engine.path / "genai_config.json").is_file():
            hugging_face = load(str(checkpoint), work=folder / "model").folder
            if not _make(engine, "genai", hugging_face, str(size), missing):
                continue
        engines.append(engine)
    for kind in GGUF_TYPES:
        path = folder / f"{kind}.gguf"
        engine = Engine(f"llama.cpp {kind}", "llama_cpp", path, llama_python)
        if path.is_file() or _make(engine, "gguf", checkpoint, kind, missing):
            engines.append(engine)
    return engines


def _make(engine: Engine, tool: str, source: Path, setting: str, missing: dict[str, str]) -> bool:
    made = engine.path.with_name(f"{engine.path.name}.part")
    command = [engine.python, str(PEER_MODELS), tool, str(source), str(made), setting]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        missing[engine.label] = (done.stderr.strip().splitlines() or ["its tool failed"])[-1]
        return False
    made.rename(engine.path)
    return True


# --- timing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Measurements of one model: seconds per round by engine, and bytes per second.

    ``peak_bytes`` is the memory of an engine's process once it has decoded.
    """

    seconds: Mapping[Engine, Sequence[float]]
    bandwidth: float
    peak_bytes: Mapping[Engine, int | None] = field(default_factory=dict)


def measure(
    engines: Sequence[Engine],
    *,
    rounds: int,
    threads: int,
    missing: dict[str, str],
    versions: dict[str, str],
) -> dict[str, Series]:
    """Run all engines in turn; engines that fail are recorded in ``missing``."""
    reader = Reader(threads)
    with ExitStack() as stack:
        workers = {}
        for engine in engines:
            try:
                workers[engine] = stack.enter_context(running(engine, threads))
            except MissingError as error:
                missing[engine.label] = str(error)
                continue
            versions[engine.kind] = workers[engine].version
        taken: dict[str, dict[Engine, list[float]]] = {name: defaultdict(list) for name in TOKENS}
        speeds = []
        for turn in range(rounds):
            # The first engine of a round finds a cooler processor, so the order rotates.
            order = list(workers)
            order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
            for name, seconds in taken.items():
                for engine in order:
                    time.sleep(SPIN_S)
                    seconds[engine].append(workers[engine].seconds(name))
            time.sleep(SPIN_S)
            speeds.append(reader.bytes_per_second())
        peaks = {engine: worker.decoding_bytes for engine, worker in workers.items()}
    bandwidth = float(np.median(speeds))
    return {name: Series(seconds, bandwidth, peaks) for name, seconds in taken.items()}


def rows(model: str, measured: str, series: Series, missing: Mapping[str, str]) -> list[Row]:
    """Each of our artifacts against each peer; the fastest peer sets the bar."""
    medians = {engine: float(np.median(taken)) for engine, taken in series.seconds.items()}
    others = sorted(
        (engine for engine in medians if not (engine.ours or engine.before)),
        key=medians.__getitem__,
    )
    compared = []
    for ours in (engine for engine in medians if engine.ours):
        case = f"{model} {measured} {TOKENS[measured]}, {ours.label}"
        for rank, peer in enumerate(others):
            row = compare(
                case,
                peer.label,
                series.seconds[ours],
                series.seconds[peer],
                ours_bytes=ours.nbytes,
                peer_bytes=peer.nbytes,
                # Reading the weights does not bound the time of a prompt.
                bandwidth=series.bandwidth if measured == DECODE else None,
                bar=None if rank else BARS[measured],
                no_more_bytes=True,
                note="" if rank else "the fastest peer",
            )
            if missing and not rank:
                row = replace(row, holds=None, note=f"{row.note} that ran")
            compared.append(row)
        for earlier in (engine for engine in medians if engine.before):
            compared += _since(model, measured, series, ours, earlier)
    return compared


def _since(
    model: str, measured: str, series: Series, ours: Engine, earlier: Engine
) -> Iterator[Row]:
    """Our artifact against one of an earlier version."""
    yield compare(
        f"{model} {measured} {TOKENS[measured]}, {ours.label}",
        earlier.label,
        series.seconds[ours],
        series.seconds[earlier],
        ours_bytes=ours.nbytes,
        peer_bytes=earlier.nbytes,
        bandwidth=series.bandwidth if measured == DECODE else None,
        bar=BEFORE_BARS.get(measured),
    )
    now, then = series.peak_bytes.get(ours), series.peak_bytes.get(earlier)
    if measured == DECODE and now is not None and then is not None:
        bar = BEFORE_BARS["peak memory"]
        yield Row(
            case=f"{model} peak memory, {ours.label}",
            ours_us=None,
            peer=earlier.label,
            peer_us=None,
            ratio=now / then,
            bar=bar,
            holds=now / then <= bar,
            ours_bytes=now,
            peer_bytes=then,
            note=f"{now / 2**20:.0f} of {then / 2**20:.0f} MiB",
        )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--artifact",
        action="append",
        required=True,
        metavar="MODEL=DIR",
        help=f"artifact of a model ({', '.join(MODELS)}); may be given again",
    )
    parser.add_argument(
        "--before",
        action="append",
        default=[],
        metavar="MODEL=DIR",
        help="artifact of an earlier version to compare with; may be given again",
    )
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    artifacts = defaultdict(list)
    given = [(text, False) for text in arguments.artifact]
    given += [(text, True) for text in arguments.before]
    for text, before in given:
        name, _, folder = text.partition("=")
        if name not in MODELS or not (Path(folder) / "model.onnx").is_file():
            parser.error(f"{text!r} names no artifact: give MODEL=DIR, as in smollm2=build/out")
        path = Path(folder).resolve()
        label = f"eoracc {path.name}{', before' if before else ''}"
        artifacts[name].append(Engine(label, "genai", path, ours=not before, before=before))
    table: list[Row] = []
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    bandwidth = 0.0
    for name, ours in artifacts.items():
        absent: dict[str, str] = {}
        others = [] if arguments.alone else peers(name, arguments.llama_python, absent)
        engines = [*ours, *others]
        measured = measure(
            engines,
            rounds=arguments.rounds,
            threads=arguments.threads,
            missing=absent,
            versions=versions,
        )
        for what, series in measured.items():
            table += rows(MODELS[name][0], what, series, absent)
            bandwidth = series.bandwidth
        missing |= {f"{MODELS[name][0]} {label}": reason for label, reason in absent.items()}
    setting = {
        "machine": machine_line(),
        "threads": arguments.threads,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "engines": ", ".join(sorted(set(versions.values()))),
    }
    show(table, setting, missing)
    if arguments.json is not None:
        write_json(arguments.json, table, setting, missing)


if __name__ == "__main__":
    main()
