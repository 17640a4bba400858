"""Time the fused op against ONNX Runtime's MatMulNBits, and memory, in one interleaved run.

    python benchmarks/kernels.py [--json FILE] [--only TEXT ...] [--seconds S] [--threads N]

Every contender is a graph of several copies of one linear, each with its own weights, mapped from a
file like those of an artifact. Contenders take turns in one process and on one thread pool, so that
ratios are stable even if absolute figures move. A time is the time of a whole run divided by the
number of copies. Suites *from memory* read a buffer larger than the last-level cache between turns;
this also measures the read bandwidth. Peers run at ``accuracy_level`` 4, as ours do; their low-rank
term is two products and a sum beside the linear. Shapes are those of real decoders
(``shapes.json``). Adapters form a bank of four that can change between runs. Rows use them in turn,
and the peer is the same linear with an empty slot for an adapter.

:data:`SQUARE_BARS` holds the bars. Nothing is asserted: a bar that does not hold is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

# A script that runs by its path can import from its own folder only.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.bandwidth import Reader
from benchmarks.machine import machine_line
from benchmarks.rows import Row, compare, show, write_json
from eoracc.plugins.library import library_info, library_path
from eoracc.plugins.operands.codes import LARGEST
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

SHAPES = Path(__file__).with_name("shapes.json")
BANDWIDTH = "memory"
PAGE = 4096
INDEX = "adapter_index"
SLAB = 256
"""Random rows of a weight; the others repeat them, because speed does not depend on values."""

Factors = Literal["int8", "float32"]
AdapterType = Literal["int8", "int4", "float16"]
ADAPTERS = 4
"""Adapters in a bank."""


@dataclass(frozen=True)
class Linear:
    """A weight matmul: output features of its merged parts, and input features."""

    name: str
    parts: tuple[int, ...]
    in_features: int

    @property
    def out_features(self) -> int:
        """``N``, all parts together."""
        return sum(self.parts)

    @property
    def label(self) -> str:
        """Name and ``[N, K]`` of the weight."""
        return f"{self.name} [{self.out_features}, {self.in_features}]"


@dataclass(frozen=True)
class Contender:
    """An implementation and its operands: ``rank`` 0 has no factors.

    ``adapter_rank`` is the rank of the bank's adapters; 0 leaves the bank empty, None has no bank.
    """

    system: Literal["eoracc", "MatMulNBits"]
    bits: int
    rank: int = 0
    factors: Factors = "int8"
    group_size: int = 32
    adapter_rank: int | None = None
    adapter_type: AdapterType = "int8"

    @property
    def label(self) -> str:
        """Label in the table."""
        low_rank = f" + rank {self.rank} {self.factors}" if self.rank else ""
        prefix = "" if self.system == "eoracc" else "MatMulNBits "
        adapters = ""
        if self.adapter_rank:
            adapters = f" + {ADAPTERS} {self.adapter_type} adapters of rank {self.adapter_rank}"
        return f"{prefix}{self.bits}-bit{low_rank}{adapters}"


@dataclass(frozen=True)
class Bar:
    """Our time may be at most ``limit`` times that of ``peer``; None compares without a bar."""

    ours: Contender
    peer: Contender | None
    limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """Comparisons over one linear, whose sessions are shared.

    Attributes:
      linear: the weight.
      bars: comparisons by rows of X. A peer of None is the read bandwidth of memory.
      from_memory: read the weights from memory, not from a cache.
    """

    linear: Linear
    bars: Mapping[int, Sequence[Bar]]
    from_memory: bool

    def case(self, rows: int, ours: Contender) -> str:
        """Name of the row in the table."""
        where = "memory" if self.from_memory else "cache"
        return f"{self.linear.label}, M={rows}, {ours.label}, from {where}"


def _ours(bits: int, rank: int = 0) -> Contender:
    return Contender("eoracc", bits, rank)


def _peer(bits: int, rank: int = 0, factors: Factors = "int8") -> Contender:
    return Contender("MatMulNBits", bits, rank, factors)


def _low_rank_peers(rank: int) -> list[Bar]:
    return [Bar(_ours(4, rank), _peer(4, rank, factors)) for factors in ("float32", "int8")]


SQUARE = Linear("square", (4096,), 4096)

_COMPENSATED = [Bar(_ours(4, 128), _peer(4), 1.05), Bar(_ours(4, 16), _peer(4), 1.02)]
_MANY_ROWS = [
    Bar(_ours(2), _peer(2), 1 / 3),
    Bar(_ours(4), _peer(4), 1.0),
    Bar(_ours(4, 128), _peer(4)),
    *_low_rank_peers(128),
    Bar(_ours(3), _peer(4)),
]
_BATCH = [replace(bar, limit=None) for bar in _MANY_ROWS]

SQUARE_BARS = (
    Suite(
        SQUARE,
        {
            1: [
                *_COMPENSATED,
                Bar(_ours(3), _peer(4), 0.80),
                Bar(_ours(2), _peer(4), 0.60),
                Bar(_ours(4), None, 1 / 0.85, "85% of the read bandwidth"),
                Bar(_ours(4), _peer(4)),
                Bar(_ours(8), _peer(8)),
                *_low_rank_peers(128),
            ],
            4: _BATCH,
            16: _BATCH,
        },
        from_memory=True,
    ),
    Suite(SQUARE, {1: [*_COMPENSATED, Bar(_ours(4), _peer(4))]}, from_memory=False),
    Suite(SQUARE, {128: _MANY_ROWS, 512: _BATCH}, from_memory=False),
)
"""The bars of the kernel, defined for 4096 x 4096 and groups of 32."""


def layer_suites() -> list[Suite]:
    """One suite for each linear of a layer, and the head, of each model in ``shapes.json``."""
    content = json.loads(SHAPES.read_text(encoding="utf-8"))
    bars = [Bar(_ours(4), _peer(4)), Bar(_ours(4, 64), _peer(4)), *_low_rank_peers(64)]
    return [
        Suite(Linear(f"{model} {name}", tuple(shape["parts"]), shape["in_features"]), rows, memory)
        for model, linears in content.items()
        for name, shape in linears.items()
        for rows, memory in (({1: bars}, True), ({128: bars}, False))
        # The head runs for the last token only.
        if name != "lm_head" or 1 in rows
    ]


def adapter_suites() -> list[Suite]:
    """Suites for the cost of an adapter in decoding: linears of SmolLM2, and a larger one."""
    layer = json.loads(SHAPES.read_text(encoding="utf-8"))["SmolLM2-135M"]
    linears = [
        Linear(f"adapters {name}", tuple(shape["parts"]), shape["in_features"])
        for name, shape in layer.items()
        if name != "lm_head"
    ]
    types: tuple[AdapterType, ...] = ("int8", "int4", "float16")
    bars = []
    for adapter_type in types:
        none = replace(_ours(3), adapter_rank=0, adapter_type=adapter_type)
        bars += [Bar(replace(none, adapter_rank=rank), none) for rank in (16, 64)]
    return [
        Suite(linear, {1: bars, 8: bars}, from_memory=True)
        for linear in (*linears, Linear("adapters square", (4096,), 4096))
    ]


# --- graphs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One node of a linear; ``inputs`` name X, operands or the output of another step."""

    op_type: str
    domain: str
    inputs: tuple[str | None, ...]
    output: str
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A contender's computation of a linear: the steps, in order, and their operands."""

    steps: Sequence[Step]
    operands: Mapping[str, NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(array.nbytes for array in self.operands.values())

    def bytes_read(self, rows: int) -> int:
        """Bytes of the adapters that one product reads: rows use the adapters in turn."""
        used = min(rows, ADAPTERS)
        return sum(
            array.nbytes * used // ADAPTERS if name.startswith("adapter_") else array.nbytes
            for name, array in self.operands.items()
        )


def recipe(contender: Contender, linear: Linear) -> Recipe:
    """The steps and operands of ``contender`` for ``linear``."""
    return (_fused if contender.system == "eoracc" else _separate)(contender, linear)


_OPERANDS = (
    *("B", "scales", None, None, "lora_a", "lora_b", "lora_a_scale", "lora_b_scale", None, None),
    *("adapter_a", "adapter_b", "adapter_a_scale", "adapter_b_scale", INDEX),
)


def _fused(contender: Contender, linear: Linear) -> Recipe:
    rng = np.random.default_rng(0)
    tiles = -(-linear.out_features // 16)
    weight = _slab(rng, contender, linear.in_features)
    operands = {name: _repeat(array, tiles) for name, array in weight.tiles().items()}
    if contender.rank:
        rank = -(-contender.rank // 16) * 16 if len(linear.parts) > 1 else contender.rank
        factors = _slab_factors(rng, rank * len(linear.parts), rank, linear.in_features).tiles()
        factors["lora_b"] = _repeat(factors["lora_b"], tiles)
        factors["lora_b_scale"] = _repeat(factors["lora_b_scale"], tiles * 16)
        operands |= factors
    if contender.adapter_rank is not None:
        operands |= _bank(rng, contender.adapter_type, contender.adapter_rank, linear)
    attributes = _attributes(linear.in_features, linear.out_features, contender) | {"layout": 1}
    if len(linear.parts) > 1:
        attributes["parts"] = linear.parts
    inputs = [name if name in operands else None for name in _OPERANDS]
    while inputs[-1] is None:
        inputs.pop()
    step = Step("MatMulNBitsLowRank", "eoracc", ("X", *inputs), "Y", attributes)
    return Recipe([step], operands)


def _bank(
    rng: np.random.Generator, adapter_type: AdapterType, rank: int, linear: Linear
) -> dict[str, NDArray[Any]]:
    tiles, ranks = -(-linear.out_features // 16), rank * len(linear.parts)

    def factor(rows: int, columns: int) -> NDArray[Any]:
        if adapter_type == "float16":
            values = rng.standard_normal((ADAPTERS, rows, columns, 16)) / 64
            return values.astype(np.float16)
        per_vector = {"int8": 4, "int4": 8}[adapter_type]
        shape = (ADAPTERS, rows, -(-columns // per_vector), 64)
        return rng.integers(1, 256, shape, np.uint8)

    bank: dict[str, NDArray[Any]] = {
        "adapter_a": factor(ranks // 16, linear.in_features),
        "adapter_b": factor(tiles, rank),
        "adapter_a_scale": np.full((ADAPTERS, ranks), 1 / linear.in_features, np.float32),
        INDEX: np.zeros(1, np.int32),
    }
    if adapter_type != "float16":
        bank["adapter_b_scale"] = np.full((ADAPTERS, 16 * tiles), 1 / 128, np.float32)
    return bank


def _separate(contender: Contender, linear: Linear) -> Recipe:
    rng = np.random.default_rng(0)
    operands: dict[str, NDArray[Any]] = {}

    def n_bits(x: str, y: str, out_features: int, in_features: int, how: Contender) -> Step:
        weight = _slab(rng, how, in_features)
        names = f"{y}_B", f"{y}_scales"
        operands[names[0]] = _repeat(weight.packed, out_features)
        # MatMulNBits needs its scales in X's type.
        operands[names[1]] = _repeat(weight.scales, out_features).astype(np.float32)
        attributes = _attributes(in_features, out_features, how)
        return Step("MatMulNBits", "com.microsoft", (x, *names), y, attributes)

    def product(x: str, y: str, out_features: int, in_features: int) -> Step:
        operands[f"{y}_B"] = rng.standard_normal((in_features, out_features), np.float32)
        return Step("MatMul", "", (x, f"{y}_B"), y, {})

    K, N, R = linear.in_features, linear.out_features, contender.rank
    if not R:
        return Recipe([n_bits("X", "Y", N, K, contender)], operands)
    # Merged linears share one down-projection, as wide as all their own together.
    down_rank = R * len(linear.parts)
    if contender.factors == "int8":
        # Its coarsest groups are the nearest to one scale a row.
        int8 = replace(contender, bits=8, group_size=min(256, _power_of_two(R)))
        factors = [n_bits("X", "T", down_rank, K, replace(int8, group_size=256))]
        factors.append(n_bits("T", "U", N, down_rank, int8))
    else:
        factors = [product("X", "T", down_rank, K), product("T", "U", N, down_rank)]
    steps = [n_bits("X", "Z", N, K, contender), *factors, Step("Add", "", ("Z", "U"), "Y", {})]
    return Recipe(steps, operands)


def _power_of_two(value: int) -> int:
    return 1 << (max(value, 16).bit_length() - 1)


def _attributes(in_features: int, out_features: int, contender: Contender) -> dict[str, Any]:
    return {
        "K": in_features,
        "N": out_features,
        "bits": contender.bits,
        "block_size": contender.group_size,
        "accuracy_level": 4,
    }


def _slab(rng: np.random.Generator, contender: Contender, in_features: int) -> NBitsWeight:
    groups = -(-in_features // contender.group_size)
    # Small enough that no sum overflows float16 in any shape.
    scales = rng.uniform(0.5, 1.5, (SLAB, groups)) / (in_features * 2**contender.bits)
    return NBitsWeight.from_codes(
        rng.integers(0, 2**contender.bits, (SLAB, in_features), np.uint8),
        scales.astype(np.float16),
        None,
        bits=contender.bits,
        group_size=contender.group_size,
    )


def _slab_factors(rng: np.random.Generator, down_rank: int, rank: int, in_features: int) -> LowRank:
    def codes(rows: int, columns: int) -> NDArray[np.int8]:
        return rng.integers(-LARGEST[8], LARGEST[8] + 1, (rows, columns), np.int8)

    return LowRank(
        lora_a=codes(down_rank, in_features),
        lora_b=codes(SLAB, rank),
        lora_a_scale=np.full(down_rank, 1 / (128 * in_features), np.float32),
        lora_b_scale=np.full(SLAB, 1 / (128 * rank), np.float32),
    )


def _repeat(array: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.resize(array, (rows, *array.shape[1:]))


_SHIFT = 4096
"""Elements by which the weights of a copy are shifted against the previous copy's."""


def write_model(made: Recipe, linear: Linear, copies: int, folder: Path) -> Path:
    """Write a model of ``copies`` of a linear that all read ``X [M, K]``, and their weights.

    Each copy has weights of its own on separate pages, as in an artifact. They differ, because ONNX
    Runtime stores equal packed weights once.
    """
    data = folder / "weights"
    x = ir.Value(name="X", type=ir.TensorType(ir.DataType.FLOAT))
    x.shape = ir.Shape(["M", linear.in_features])
    inputs = [x]
    nodes: list[ir.Node] = []
    outputs: list[ir.Value] = []
    initializers: list[ir.Value] = []
    index = ir.Value(name=INDEX, shape=ir.Shape(["rows"]), type=ir.TensorType(ir.DataType.INT32))
    if INDEX in made.operands:
        inputs.append(index)
    with data.open("wb") as file:
        for copy in range(copies):
            values = {"X": x, INDEX: index}
            for name, array in made.operands.items():
                if name == INDEX:
                    continue
                initializers.append(_initializer(_stored(array, f"{name}.{copy}", copy, file)))
                values[name] = initializers[-1]
                if name.startswith("adapter_"):  # a run can replace them
                    inputs.append(initializers[-1])
            for step in made.steps:
                node = ir.node(
                    step.op_type,
                    [None if name is None else values[name] for name in step.inputs],
                    dict(step.attributes),
                    domain=step.domain,
                    name=f"{step.output}.{copy}",
                )
                values[step.output] = node.outputs[0]
                node.outputs[0].name = f"{step.output}.{copy}"
                nodes.append(node)
            values["Y"].type = ir.TensorType(ir.DataType.FLOAT)
            values["Y"].shape = ir.Shape(["M", linear.out_features])
            outputs.append(values["Y"])
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": 23, "com.microsoft": 1, "eoracc": 1},
        name="copies",
    )
    path = folder / "model.onnx"
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def _stored(array: NDArray[Any], name: str, copy: int, file: BufferedWriter) -> ir.TensorProtocol:
    """The operand of a copy, on a page of its own in the weight file."""
    if array.size == 0:  # ONNX Runtime cannot read an empty tensor from a file
        return ir.tensor(array, name=name)
    data = Path(file.name)
    file.seek(-(-file.tell() // PAGE) * PAGE)
    tensor = ir.ExternalTensor(
        data.name,
        file.tell(),
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name=name,
        base_dir=data.parent,
    )
    file.write(np.roll(array.reshape(-1), _SHIFT * copy).data)
    return tensor


def _initializer(tensor: ir.TensorProtocol) -> ir.Value:
    return ir.Value(
        name=tensor.name,
        const_value=tensor,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
    )


# --- timing ---------------------------------------------------------------------------------------


class Runner:
    """One contender's session on one linear."""

    def __init__(
        self, contender: Contender, linear: Linear, nbytes: int, folder: Path, library: Path
    ) -> None:
        folder.mkdir()
        self._made = made = recipe(contender, linear)
        self.copies = min(64, max(1, round(nbytes / made.nbytes)))
        self._linear = linear
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3  # it warns about each operand that a run can change
        options.register_custom_ops_library(str(library))
        model = write_model(made, linear, self.copies, folder)
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def bind(self, rows: int) -> None:
        """Prepare for ``rows`` rows of X, and warm up."""
        self.nbytes = self._made.bytes_read(rows)
        x = np.random.default_rng(1).standard_normal((rows, self._linear.in_features), np.float32)
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("X", x)
        if any(value.name == INDEX for value in self._session.get_inputs()):
            self._binding.bind_cpu_input(INDEX, np.arange(rows, dtype=np.int32) % ADAPTERS)
        y = np.empty((rows, self._linear.out_features), np.float32)
        for output in self._session.get_outputs():
            value = ort.OrtValue.ortvalue_from_numpy(y)
            self._binding.bind_ortvalue_output(output.name, value)
        self.seconds()

    def seconds(self) -> float:
        """Time of one product, in seconds."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - start) / self.copies


SPIN_S = 0.05
"""ONNX Runtime's threads spin for some time after a run; nothing else is timed meanwhile."""

CACHE_BYTES = 32 << 20
"""Bytes of one contender's weights, over all copies, for reads from a cache."""

_CACHES_FULL = 2.5
"""Bytes of all contenders' weights, so that each turn finds its own evicted from every cache."""


def memory_bytes(contenders: int, cache: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Weight bytes of one of ``contenders``, over all copies, so that every turn reads memory."""
    sizes = [path.read_text().strip() for path in cache.glob("index*/size")]
    last = max((int(size.removesuffix("K")) << 10 for size in sizes), default=0)
    return max(96 << 20, round(_CACHES_FULL * last / contenders))


def _contenders(bars: Iterable[Bar]) -> list[Contender]:
    """The contenders of ``bars``, each once, in order."""
    sides = (side for bar in bars for side in (bar.ours, bar.peer))
    return list(dict.fromkeys(side for side in sides if side is not None))


def measure(suite: Suite, reader: Reader, library: Path, seconds: float) -> Iterator[Row]:
    """Time all contenders of a suite in turn, for about ``seconds`` per row count."""
    bars = [bar for at in suite.bars.values() for bar in at]
    contenders = _contenders(bars)
    nbytes = memory_bytes(len(contenders)) if suite.from_memory else CACHE_BYTES
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            contender: Runner(contender, suite.linear, nbytes, Path(folder) / str(i), library)
            for i, contender in enumerate(contenders)
        }
        for rows, compared in suite.bars.items():
            turn = {contender: runners[contender] for contender in _contenders(compared)}
            for runner in turn.values():
                runner.bind(rows)
            taken: dict[Contender, list[float]] = {contender: [] for contender in turn}
            speeds: list[float] = []
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(speeds) < 3:
                if suite.from_memory or not speeds:
                    time.sleep(SPIN_S)
                    speeds.append(reader.bytes_per_second())
                else:
                    speeds.append(speeds[-1])
                for contender, runner in turn.items():
                    taken[contender].append(runner.seconds())
            bandwidth = float(np.median(speeds))
            for bar in compared:
                ours = turn[bar.ours]
                memory = [ours.nbytes / speed for speed in speeds]
                yield compare(
                    suite.case(rows, bar.ours),
                    BANDWIDTH if bar.peer is None else bar.peer.label,
                    taken[bar.ours],
                    memory if bar.peer is None else taken[bar.peer],
                    ours_bytes=ours.nbytes,
                    peer_bytes=ours.nbytes if bar.peer is None else turn[bar.peer].nbytes,
                    bandwidth=bandwidth,
                    bar=bar.limit,
                    note=bar.note,
                )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--only",
        nargs="+",
        default=["square"],
        metavar="TEXT",
        help="suites whose name contains one of these; '' is all of them (default: square)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="for each suite and row count")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--library", type=Path, help="a build of ours (default: the installed one)")
    arguments = parser.parse_args()
    library = arguments.library or library_path()
    ort.set_global_thread_pool_sizes(arguments.threads, 1)
    reader = Reader(arguments.threads)
    suites = [
        suite
        for suite in (*SQUARE_BARS, *layer_suites(), *adapter_suites())
        if any(text in suite.linear.name for text in arguments.only)
    ]
    rows = [row for suite in suites for row in measure(suite, reader, library, arguments.seconds)]
    setting = {
        "machine": machine_line(),
        "instruction_set": library_info(library).instruction_set,
        "onnxruntime": ort.__version__,
        "threads": arguments.threads,
        "bandwidth_gb_s": round(reader.bytes_per_second() / 1e9, 1),
    }
    show(rows, setting, {})
    if arguments.json is not None:
        write_json(arguments.json, rows, setting, {})


if __name__ == "__main__":
    main()
