"""Rotary tables that a lowered graph computes instead of storing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.compiler.targets.onnxruntime.rotary_tables import (
    compute_rotary_tables,
    table_frequencies,
)
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.graph.tensors import register_tensor
from tests.graph_session import GraphSession, assert_close, padded_mask
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

POSITIONS = 2048
ORIGINAL = 16
ROPE: dict[str, Any] = {"rope_theta": 10000.0}
LONG: dict[str, Any] = {
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}

# Family, rope_parameters, and how many tables its lowered graph has.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    "default": ("llama", {"rope_type": "default", **ROPE}, 2),
    "yarn": ("llama", {"rope_type": "yarn", "factor": 4.0, **ROPE}, 2),
    "proportional": (
        "llama",
        {"rope_type": "proportional", "partial_rotary_factor": 0.5, **ROPE},
        2,
    ),
    "longrope": ("phi3", {"rope_type": "longrope", **LONG, **ROPE}, 2),
    "two thetas": (
        "gemma3",
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
        4,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_table_is_stored_and_logits_are_those_of_the_eager_model(
    kind: str, tmp_path: Path
) -> None:
    family, parameters, tables = KINDS[kind]
    fields: dict[str, Any] = {"rope_parameters": parameters, "max_position_embeddings": POSITIONS}
    if family == "phi3":
        fields["original_max_position_embeddings"] = ORIGINAL
    source = load(str(tiny_model(family, tmp_path / "model", **fields)), work=tmp_path)
    lowered = lower(source.model)
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    assert not any(_is_table(value) for value in lowered.graph.initializers.values())
    computed = [value for node in lowered.graph for value in node.outputs if _is_table(value)]
    assert len(computed) == tables
    session, eager = GraphSession(lowered, tmp_path), load_eager(source.folder, {})
    # Rows on both sides of LongRoPE's original length.
    tokens = np.random.default_rng(3).integers(3, VOCABULARY, (2, 24))
    mask = padded_mask((24, 9), 24, left=False)
    expected = reference_logits(eager, tokens, mask)
    assert_close(session.logits(tokens, mask), expected, source.config, mask)


def _is_table(value: ir.Value) -> bool:
    shape = () if value.shape is None else tuple(value.shape)
    return len(shape) == 2 and isinstance(shape[0], int) and shape[0] >= POSITIONS


def tables(
    frequencies: NDArray[np.float32], positions: int, scale: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Tables in float64 of angles that are rounded to float32, as every framework has them."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))
    return (cos * scale).astype(np.float32), (sin * scale).astype(np.float32)


@pytest.mark.parametrize("base", [1e2, 1e4, 1e7])
@pytest.mark.parametrize("positions", [64, 3000, 40000])
@pytest.mark.parametrize("scale", [1.0, 1.19])
def test_frequencies_of_a_table(base: float, positions: int, scale: float) -> None:
    exact = (base ** -(np.arange(32) / 32)).astype(np.float32)
    found = table_frequencies(*tables(exact, positions, scale))
    assert found is not None
    frequencies, factor = found
    assert factor == np.float32(scale)
    # A frequency is known as exactly as the largest angle, of a turn at most, tells it.
    largest = np.minimum((positions - 1) * exact, 1.0)
    assert (np.abs(frequencies / exact - 1) <= 4 * 2.0**-24 / largest).all()
    assert (frequencies == exact)[(positions - 1) * exact > 8].all()


def test_tables_that_frequencies_do_not_give() -> None:
    frequencies = np.array([1.0, 0.1, 0.01, 0.0], np.float32)
    cos, sin = tables(frequencies, 512)
    assert table_frequencies(cos, sin) is not None
    assert table_frequencies(sin, cos) is None
    for array in (cos, sin):
        changed = array.copy()
        changed[300, 1] += 8 * 2.0**-24
        pair = (changed, sin) if array is cos else (cos, changed)
        assert table_frequencies(*pair) is None


def _lookup(cos: NDArray[np.float32], sin: NDArray[np.float32]) -> ir.Model:
    """A graph that rotates zeros at position 3 by stored tables."""
    x = ir.Value(
        name="x",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([1, 1, 1, 2 * cos.shape[1]]),
    )
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="lookup")
    at = register_tensor(graph, ir.tensor(np.array([[3]]), name="at"))
    tape = ir.tape.Tape()
    gathered = [
        tape.op("Gather", [register_tensor(graph, ir.tensor(array, name=name)), at])
        for name, array in (("cos", cos), ("sin", sin))
    ]
    rotated = tape.op("RotaryEmbedding", [x, *gathered])
    rotated.name, rotated.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.extend(tape.nodes)
    graph.outputs.append(rotated)
    return ir.Model(graph, ir_version=11)


def test_small_and_foreign_tables_stay_stored() -> None:
    frequencies = np.array([1.0, 0.1, 0.01, 0.0], np.float32)
    cos, sin = tables(frequencies, 2048)
    foreign = np.random.default_rng(0).normal(size=cos.shape).astype(np.float32)
    for pair in ((cos[:512], sin[:512]), (foreign, sin), (cos, foreign), (cos, sin[:, :3])):
        model = _lookup(*pair)
        compute_rotary_tables(model.graph)
        assert {"cos", "sin"} < set(model.graph.initializers)
        assert all(node.op_type in ("Gather", "RotaryEmbedding") for node in model.graph)


def test_the_runtime_computes_the_same_tables() -> None:
    """One segment behind the other, each of its own frequencies and scale."""
    frequencies = np.array([1.0, 0.3, 0.01, 1e-4], np.float32)
    parts = [tables(frequencies, 300, 1.1), tables(frequencies / np.float32(2), 1500, 1.2)]
    cos, sin = (np.concatenate(both) for both in zip(*parts, strict=True))
    model = _lookup(cos, sin)
    compute_rotary_tables(model.graph)
    assert not {"cos", "sin"} & set(model.graph.initializers)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend([values["cos"], values["sin"]])
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    actual = session.run(["cos", "sin"], {"x": np.zeros((1, 1, 1, 8), np.float32)})
    bound = 1.2 * 4 * 2.0**-24
    np.testing.assert_allclose(actual, (cos, sin), rtol=0, atol=bound)
