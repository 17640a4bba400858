"""Random and malformed tensors through the op in ONNX Runtime, to be run under sanitizers.

    python -m tests.native.fuzz_op LIBRARY [CASES [SEED]]

Every case must either run, and then be right, or be refused by an exception. A crash or a read out
of bounds ends the process. Tensors are allocated one by one, so that a sanitizer sees their ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.reference import fused_matmul
from tests.plugins.fused_op import (
    attributes_of,
    error_bound,
    fused_operands,
    one_node_model,
    random_factors,
    random_int8_factors,
    random_weight,
)

Array = NDArray[Any]

RUNS, FAILS, EITHER = "must run", "must be refused", "may do either"


@dataclass(frozen=True, kw_only=True)
class Node:
    """The op with its inputs, and what must become of it.

    Attributes:
      x: the activations.
      operands: the inputs behind X, by name.
      attributes: by name.
      expected: what Y is, None where level 4 leaves it open.
      bound: how far Y may be from it.
      outcome: one of ``RUNS``, ``FAILS`` and ``EITHER``.
      defects: what was done to it.
    """

    x: Array
    operands: dict[str, Array | None]
    attributes: dict[str, Any]
    expected: Array | None = None
    bound: Array | None = None
    outcome: str = RUNS
    defects: list[str] = field(default_factory=list)


def draw_node(rng: np.random.Generator) -> Node:
    """A node that must run."""
    layout, level = int(rng.integers(2)), int(rng.choice([0, 4]))
    parts: list[int] = []
    if layout == 1 and rng.random() < 0.4:
        count = int(rng.integers(2, 4))
        parts = [16 * int(rng.integers(1, 3))] * count
    activation = str(rng.choice(["", "silu", "gelu_tanh"])) if len(parts) == 2 else ""
    in_features = int(rng.integers(1, 80))
    out_features = sum(parts) or int(rng.integers(1, 50))
    shape = (out_features, in_features)
    weight = random_weight(
        rng,
        shape,
        bits=int(rng.choice([2, 3, 4, 6, 8])),
        group_size=8 * int(rng.integers(1, 12)),
        zero_points=bool(rng.integers(2)),
        scales=np.float16 if rng.random() < 0.5 else np.float32,
    )
    factors = None
    if rng.random() < 0.7:
        rank = 16 * int(rng.integers(3)) if parts else int(rng.integers(40))
        draw = [random_factors, random_int8_factors][rng.integers(2)]
        down, up = (draw(rng, shape, rank=r) for r in (rank * (len(parts) or 1), rank))
        factors = LowRank(
            lora_a=down.lora_a,
            lora_b=up.lora_b,
            lora_a_scale=down.lora_a_scale,
            lora_b_scale=up.lora_b_scale,
        )
    leading = tuple(int(size) for size in rng.integers(0, 4, rng.integers(0, 3)))
    x = rng.standard_normal((*leading, in_features), np.float32)
    width = out_features // 2 if activation else out_features
    bias = rng.standard_normal(out_features, np.float32) if rng.random() < 0.5 else None
    fusions: dict[str, Any] = {
        "norm_weight": rng.random(in_features, np.float32) if rng.random() < 0.3 else None,
        "residual": rng.random((*leading, width), np.float32) if rng.random() < 0.3 else None,
    }
    operands = fused_operands(weight, factors, bias, layout=layout, **fusions)
    if layout == 1 and rng.random() < 0.6:
        bank, adapters = draw_bank(rng, shape, leading, len(parts) or 1)
        operands |= bank
        fusions |= adapters
    fusions |= {"norm_epsilon": 1e-5, "parts": parts, "activation": activation}
    attributes: dict[str, Any] = {**attributes_of(weight), "norm_epsilon": 1e-5}
    attributes |= {"accuracy_level": level, "layout": layout}
    if parts:
        attributes |= {"parts": parts, "activation": activation}
    if level == 4:
        return Node(x=x, operands=operands, attributes=attributes)
    return Node(
        x=x,
        operands=operands,
        attributes=attributes,
        expected=fused_matmul(x, weight, factors, bias, **fusions),
        bound=error_bound(x, weight, factors, bias, **fusions),
    )


def draw_bank(
    rng: np.random.Generator, shape: tuple[int, int], leading: tuple[int, ...], parts: int
) -> tuple[dict[str, Array | None], dict[str, Any]]:
    """Adapters as operands, and as the oracle takes them."""
    rank, kind = 16 * int(rng.integers(3)), str(rng.choice(["int8", "int4", "float"]))
    if shape[1] <= 4 and kind == "int4":
        kind = "int8"  # the shapes of a row of four columns are alike, and count as int8
    adapters, weights = [], []
    for _ in range(int(rng.integers(1, 4))):
        if kind == "float":
            down, up = (random_factors(rng, shape, rank=r) for r in (rank * parts, rank))
        else:
            down, up = (random_int8_factors(rng, shape, rank=r) for r in (rank * parts, rank))
        adapter = LowRank(
            lora_a=down.lora_a,
            lora_b=up.lora_b,
            lora_a_scale=down.lora_a_scale,
            lora_b_scale=up.lora_b_scale,
        )
        if kind == "int4":
            adapter = replace(
                adapter,
                lora_a=(adapter.lora_a // 19).astype(np.int8),
                lora_b=(adapter.lora_b // 19).astype(np.int8),
                bits=4,
            )
        adapters.append(adapter)
        ones = np.ones(rank * parts, np.float32)
        weights.append(ones * rng.uniform(0.5, 1.5) if kind == "float" else ones)
    tiles = [adapter.tiles() for adapter in adapters]
    batch = int(np.prod(leading[:-1] if len(leading) > 1 else leading))
    count = batch if rng.random() < 0.5 else 1
    index = rng.integers(-1, len(adapters), count).astype(np.int32)
    a_scales = [
        tile.get("lora_a_scale", weight) for tile, weight in zip(tiles, weights, strict=True)
    ]
    bank: dict[str, Array | None] = {
        "adapter_a": np.stack([tile["lora_a"] for tile in tiles]),
        "adapter_b": np.stack([tile["lora_b"] for tile in tiles]),
        "adapter_a_scale": np.stack(a_scales).astype(np.float32),
        "adapter_b_scale": None
        if kind == "float"
        else np.stack([tile["lora_b_scale"] for tile in tiles]),
        "adapter_index": index,
    }
    return bank, {"adapters": adapters, "adapter_scales": weights, "adapter_index": index}


# --- defects --------------------------------------------------------------------------------------


def _resized(array: Array, axis: int, size: int) -> Array:
    shape = list(array.shape)
    shape[axis] = size
    return np.resize(array, shape) if array.size else np.zeros(shape, array.dtype)


def _misshapen(rng: np.random.Generator, array: Array) -> Array:
    axis = int(rng.integers(array.ndim))
    size = array.shape[axis]
    shapes: list[Array] = [
        _resized(array, axis, size + 1),
        _resized(array, axis, max(size - 1, 0)),
        _resized(array, axis, 0),
        _resized(array, axis, 3 * size + 16),
        array[None],
        array.reshape((1,) * 9 + array.shape),
        array.reshape(-1),
        np.zeros((), array.dtype),
        array.T,
    ]
    return np.ascontiguousarray(shapes[rng.integers(len(shapes))])


def wrong_shape(rng: np.random.Generator, node: Node) -> Node:
    """An operand of another shape."""
    name, array = _any_operand(rng, node)
    changed = _misshapen(rng, array)
    outcome = FAILS
    # A tiled factor may have been padded to another rank, which is the same tiles of lora_a.
    if changed.shape == array.shape or (name == "lora_b" and node.attributes["layout"] == 1):
        outcome = EITHER
    if _is_unread(node, name) or name == "adapter_index":
        outcome = EITHER
    return _changed(node, {name: changed}, outcome, f"{name} {array.shape} -> {changed.shape}")


def wrong_type(rng: np.random.Generator, node: Node) -> Node:
    """An operand of another type."""
    name, array = _any_operand(rng, node)
    dtype = [np.int32, np.float64, np.int64, np.bool_, np.int8, np.uint8, np.float16][
        rng.integers(7)
    ]
    never = dtype not in {np.int8, np.uint8, np.float16} and not _is_unread(node, name)
    never = never and array.dtype != dtype
    return _changed(
        node, {name: array.astype(dtype)}, FAILS if never else EITHER, f"{name} as {dtype.__name__}"
    )


def missing(rng: np.random.Generator, node: Node) -> Node:
    """An operand that is not there."""
    name, _ = _any_operand(rng, node)
    needed = name in {"B", "scales", "lora_a", "lora_b"} or name.endswith("_scale")
    needed = (needed or name.startswith("adapter_")) and not _is_unread(node, name)
    rank_0 = name.endswith("_scale") and 0 in node.x.shape
    return _changed(node, {name: None}, FAILS if needed and not rank_0 else EITHER, f"no {name}")


def swapped(rng: np.random.Generator, node: Node) -> Node:
    """Two operands in each other's place."""
    (one, first), (other, second) = _any_operand(rng, node), _any_operand(rng, node)
    return _changed(node, {one: second, other: first}, EITHER, f"{one} and {other} swapped")


def wrong_activations(rng: np.random.Generator, node: Node) -> Node:
    """X whose last dimension is not K, or that has none."""
    size = min(max(node.attributes["K"], 1), 1000)  # which may be another defect
    shapes: list[Array] = [
        np.zeros((2, size + 1), np.float32),
        np.zeros((2, size - 1), np.float32),
        np.zeros((), np.float32),
        np.zeros(0, np.float32),
        np.zeros((0, size + 1), np.float32),
        np.zeros((*(1,) * 9, size), np.float32),
    ]
    x = shapes[rng.integers(len(shapes))]
    return replace(node, x=x, outcome=FAILS, defects=[*node.defects, f"X {x.shape}"])


def wrong_attribute(rng: np.random.Generator, node: Node) -> Node:
    """An attribute that the operands do not fit, or that makes no sense."""
    huge = 2**62
    choices: list[tuple[str, Any]] = [
        *(("K", value) for value in (0, -1, node.attributes["K"] + 1, 2**31 - 1, huge)),
        *(("N", value) for value in (0, -1, node.attributes["N"] + 16, 2**31 - 1, huge)),
        *(("bits", value) for value in (0, 1, 5, 16, -4, huge)),
        *(("block_size", value) for value in (0, -8, 7, 12, huge)),
        *(("accuracy_level", value) for value in (1, 5, -4)),
        *(("layout", value) for value in (2, -1, 1 - node.attributes["layout"])),
        *(("parts", value) for value in ([0], [-16, 16], [16] * 9, [huge, huge], [1, 2])),
        *(("ranks", value) for value in ([-1], [huge], [1] * 9, [16, -16])),
        *(("activation", value) for value in ("relu", "gelu_tanh_of_a_long_name")),
    ]
    name, value = choices[rng.integers(len(choices))]
    attributes = node.attributes | {name: value}
    defects = [*node.defects, f"{name} = {value}"]
    return replace(node, attributes=attributes, outcome=FAILS, defects=defects)


def _is_unread(node: Node, name: str) -> bool:
    """Whether it is an adapter's operand in a bank of rank 0, of which sizes matter little."""
    adapter_a = node.operands.get("adapter_a")
    return name.startswith("adapter_") and (adapter_a is None or adapter_a.size == 0)


def _any_operand(rng: np.random.Generator, node: Node) -> tuple[str, Array]:
    present = [(name, array) for name, array in node.operands.items() if array is not None]
    return present[rng.integers(len(present))]


def _changed(node: Node, operands: dict[str, Array | None], outcome: str, defect: str) -> Node:
    return replace(
        node,
        operands=node.operands | operands,
        outcome=outcome,
        defects=[*node.defects, defect],
    )


DEFECTS: list[Callable[[np.random.Generator, Node], Node]] = [
    wrong_shape,
    wrong_shape,
    wrong_type,
    missing,
    swapped,
    wrong_activations,
    wrong_attribute,
]


# --- running --------------------------------------------------------------------------------------


def run(rng: np.random.Generator, node: Node, library: str) -> Array:
    """Y, with each operand at random a constant of the model or an input of the run."""
    present = {name: array for name, array in node.operands.items() if array is not None}
    inputs = tuple(name for name in present if rng.random() < 0.5)
    model = one_node_model(
        "MatMulNBitsLowRank",
        node.operands,
        node.attributes,
        graph_inputs=inputs,
        with_function=False,
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feeds = {"X": node.x} | {name: present[name] for name in inputs}
    (y,) = session.run(None, feeds)
    return np.asarray(y)


def check(rng: np.random.Generator, node: Node, library: str) -> str | None:
    """What is wrong with how the op takes ``node``, None for nothing."""
    try:
        y = run(rng, node, library)
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's own types have no common base
        return f"was refused: {error}" if node.outcome == RUNS else None
    if node.outcome == FAILS:
        return "was not refused"
    if node.outcome == RUNS and not np.isfinite(y).all():
        return "is not finite"
    if node.expected is not None and node.bound is not None and not node.defects:
        if y.shape != node.expected.shape:
            return f"has the shape {y.shape}"
        if not (np.abs(y - node.expected) <= node.bound).all():
            return f"is off by {np.abs(y - node.expected).max():.3g}"
    return None


def main(library: str, cases: int = 400, seed: int = 0) -> int:
    """Run the cases; the exit status."""
    failures = 0
    for case in range(cases):
        rng = np.random.default_rng([seed, case])
        node = draw_node(rng)
        for _ in range(int(rng.integers(3))):
            node = DEFECTS[rng.integers(len(DEFECTS))](rng, node)
        if len(node.defects) > 1:
            node = replace(node, outcome=EITHER)  # one may take back the other
        if problem := check(rng, node, library):
            failures += 1
            what = ", ".join(node.defects) or "no defect"
            print(f"case {case} ({what}) {node.attributes}: {problem}", file=sys.stderr)
    print(f"{cases} nodes: {'FAILED' if failures else 'run right or refused'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *(int(argument) for argument in sys.argv[2:])))
