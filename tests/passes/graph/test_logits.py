"""Steps behind a head, against finite differences and graphs that have others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.graph.logits import LogitSteps

VOCABULARY = 5

Step = tuple[str, Any]
"""An operator and its constant; None for none."""

EXACT: dict[str, Callable[[Any, Any], Any]] = {
    "Mul": lambda z, c: z * c,
    "Div": lambda z, c: z / c,
    "Add": lambda z, c: z + c,
    "Tanh": lambda z, _: np.tanh(z),
    "Identity": lambda z, _: z,
}


def head_of(*nodes: Step, reversed_first: bool = False) -> Linear:
    """The head of a graph in which ``nodes`` follow it, operators with their constants."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    weight = ir.Value(
        name="lm_head.weight", const_value=ir.tensor(np.ones((4, VOCABULARY), np.float32))
    )
    made = [ir.node("MatMul", [x, weight], name="lm_head")]
    constants = [weight]
    for kind, constant in nodes:
        inputs = [made[-1].outputs[0]]
        if constant is not None:
            tensor = ir.tensor(np.asarray(constant, np.float32))
            constants.append(ir.Value(name=f"c{len(made)}", const_value=tensor))
            inputs.append(constants[-1])
        made.append(ir.node(kind, inputs[::-1] if reversed_first and len(made) == 1 else inputs))
    graph = ir.Graph(
        [x], [made[-1].outputs[0]], nodes=made, initializers=constants, opset_imports={"": 21}
    )
    (head,) = find_linears(ir.Model(graph, ir_version=10))
    return head


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (("Mul", 0.3),),
        (("Div", 4.0), ("Tanh", None), ("Mul", 4.0)),
        (("Add", [0.1, -2.0, 0.5, 0.0, 1.0]), ("Identity", None), ("Div", [2.0])),
    ],
)
def test_slopes_are_the_derivatives_of_the_logits(
    nodes: tuple[Step, ...],
) -> None:
    steps = LogitSteps.of(head_of(*nodes))
    assert steps is not None
    outputs = np.random.default_rng(0).normal(0, 2, (7, VOCABULARY)).astype(np.float32)
    exact = outputs.astype(np.float64)
    for kind, constant in nodes:
        exact = EXACT[kind](exact, np.asarray(constant or 0.0))
    logits, slopes = steps(outputs)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-6)
    step = np.float32(2**-7)
    above, below = steps(outputs + step)[0], steps(outputs - step)[0]
    np.testing.assert_allclose(slopes, (above - below) / (2 * step), rtol=2e-3, atol=2e-4)
    assert slopes.shape == outputs.shape


@pytest.mark.parametrize(
    "head",
    [
        head_of(("Exp", None)),
        head_of(("Div", 2.0), reversed_first=True),
        head_of(("Mul", [[1.0], [2.0]])),
    ],
)
def test_other_steps_are_not_known(head: Linear) -> None:
    assert LogitSteps.of(head) is None


def test_a_product_may_have_its_constant_first() -> None:
    steps = LogitSteps.of(head_of(("Mul", 2.0), reversed_first=True))
    assert steps is not None
    np.testing.assert_array_equal(steps(np.ones((1, VOCABULARY), np.float32))[0], 2)
