"""Times the fused op against ONNX Runtime's own MatMul and MatMulNBits, in one interleaved run.

Every repetition runs each contender once, so that a busy machine slows all of them alike: ratios
hold where absolute figures move. With ``--threads 1`` processor time is measured instead of the
clock, which other work on the machine disturbs least. Shapes are those of real decoders.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eoracc.plugins.library import library_info, library_path
from eoracc.plugins.operands import LowRank, NBitsWeight

SHAPES = {
    "SmolLM2-135M gate_proj": (1536, 576),
    "Llama-2-7B q_proj": (4096, 4096),
}
"""``(out_features, in_features)``."""

GROUP_SIZE = 64
RANK = 64
BASELINE = "MatMul float32"


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender on one shape."""

    shape: str
    rows: int
    contender: str
    fastest: float
    median: float


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512], help="tokens in X")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape and row count")
    parser.add_argument("--json", type=Path, help="write the timings here, too")
    arguments = parser.parse_args()
    info = library_info(library_path())
    setting = {
        "processor": platform.processor() or platform.machine(),
        "instruction_set": info.instruction_set,
        "onnxruntime": ort.__version__,
        "threads": arguments.threads,
        "group_size": GROUP_SIZE,
    }
    timings: list[Timing] = []
    for shape, sizes in SHAPES.items():
        sessions = contenders(*sizes, threads=arguments.threads)
        for rows in arguments.rows:
            clock = time.thread_time if arguments.threads == 1 else time.perf_counter
            timings += measure(sessions, shape, rows, seconds=arguments.seconds, clock=clock)
    show(timings, setting)
    if arguments.json is not None:
        report = setting | {"timings": [asdict(timing) for timing in timings]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def contenders(
    out_features: int, in_features: int, *, threads: int
) -> dict[str, ort.InferenceSession]:
    """One session for each contender, by name."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((in_features, out_features), np.float32)
    factors = LowRank(
        lora_a=rng.standard_normal((RANK, in_features)).astype(np.float16),
        lora_b=rng.standard_normal((out_features, RANK)).astype(np.float16),
    )
    models = {
        BASELINE: _model("", "MatMul", {"B": dense}, {}),
        "MatMulNBits 4-bit": _quantized_peer(_random_weight(rng, out_features, in_features, 4)),
    }
    for bits in (3, 4):
        weight = _random_weight(rng, out_features, in_features, bits)
        models[f"eoracc {bits}-bit"] = _fused(weight, None)
        models[f"eoracc {bits}-bit, rank {RANK}"] = _fused(weight, factors)
    return {name: _session(model, threads) for name, model in models.items()}


def measure(
    sessions: dict[str, ort.InferenceSession],
    shape: str,
    rows: int,
    *,
    seconds: float,
    clock: Callable[[], float],
) -> list[Timing]:
    """Time all contenders on ``rows`` rows, turn by turn, for about ``seconds``."""
    in_features = SHAPES[shape][1]
    x = np.random.default_rng(1).standard_normal((rows, in_features), np.float32)
    for session in sessions.values():
        session.run(None, {"X": x})
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[BASELINE]) < 3:
        for name, session in sessions.items():
            start = clock()
            session.run(None, {"X": x})
            taken[name].append(clock() - start)
    return [
        Timing(shape, rows, name, min(times), float(np.median(times)))
        for name, times in taken.items()
    ]


def show(timings: list[Timing], setting: dict[str, Any]) -> None:
    """Print the table; ratios are of medians, above 1 is faster than the float32 MatMul."""
    console = Console(width=110)
    console.print(", ".join(f"{name} {value}" for name, value in setting.items()))
    table = Table("shape", "rows", "contender", "fastest µs", "median µs", "times float32")
    for column in table.columns[3:]:
        column.justify = "right"
    baseline = {(t.shape, t.rows): t.median for t in timings if t.contender == BASELINE}
    previous = None
    for timing in timings:
        key = (timing.shape, timing.rows)
        if previous not in {None, key}:
            table.add_section()
        previous = key
        table.add_row(
            timing.shape,
            str(timing.rows),
            timing.contender,
            f"{timing.fastest * 1e6:,.0f}",
            f"{timing.median * 1e6:,.0f}",
            f"{baseline[key] / timing.median:.2f}",
        )
    console.print(table)


def _random_weight(
    rng: np.random.Generator, out_features: int, in_features: int, bits: int
) -> NBitsWeight:
    groups = -(-in_features // GROUP_SIZE)
    return NBitsWeight.from_codes(
        rng.integers(0, 2**bits, (out_features, in_features), np.uint8),
        rng.uniform(0.5, 1.5, (out_features, groups)).astype(np.float16),
        rng.integers(0, 2**bits, (out_features, groups), np.uint8),
        bits=bits,
        group_size=GROUP_SIZE,
    )


def _fused(weight: NBitsWeight, factors: LowRank | None) -> bytes:
    operands = {
        "B": weight.packed,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "bias": None,
        "lora_a": None if factors is None else factors.lora_a,
        "lora_b": None if factors is None else factors.lora_b,
    }
    return _model("eoracc", "MatMulNBitsLowRank", operands, _attributes(weight))


def _quantized_peer(weight: NBitsWeight) -> bytes:
    # Its scales must be of X's type, and its zero points are packed like the codes.
    assert weight.zero_points is not None
    nibbles = np.pad(weight.zero_points, ((0, 0), (0, weight.zero_points.shape[1] % 2)))
    operands: dict[str, NDArray[Any] | None] = {
        "B": weight.packed,
        "scales": weight.scales.astype(np.float32),
        "zero_points": nibbles[:, ::2] | nibbles[:, 1::2] << 4,
    }
    return _model("com.microsoft", "MatMulNBits", operands, _attributes(weight))


def _attributes(weight: NBitsWeight) -> dict[str, int]:
    return {
        "K": weight.in_features,
        "N": weight.out_features,
        "bits": weight.bits,
        "block_size": weight.group_size,
    }


def _model(
    domain: str, op_type: str, operands: dict[str, NDArray[Any] | None], attributes: dict[str, int]
) -> bytes:
    """A model that applies one op to its input ``X``."""
    x = ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT))
    initializers = {
        name: ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for name, array in operands.items()
        if array is not None
    }
    inputs = [x, *(initializers.get(name) for name in operands)]
    while inputs[-1] is None:
        inputs.pop()
    node = ir.node(op_type, inputs, attributes, domain=domain, name=op_type)
    y = node.outputs[0]
    y.name, y.type = "Y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x],
        [y],
        nodes=[node],
        initializers=list(initializers.values()),
        opset_imports={"": 23, domain: 1} if domain else {"": 23},
        name=op_type,
    )
    serialized: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return serialized


def _session(model: bytes, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
