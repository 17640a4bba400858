from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.sweep.cut import cut_graph, group_by_level, node_levels
from eoracc.compiler.sweep.executor import Executor
from eoracc.passes.graph.linears import find_linears
from tests.tiny_models import FAMILIES, tiny_model

if TYPE_CHECKING:
    from pathlib import Path


def test_levels_and_groups_of_a_llama_block(tmp_path: Path) -> None:
    executor = Executor(load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path).model)
    roles = [
        [tuple(linear.role for linear in group.linears) for group in level]
        for level in executor.levels
    ]
    block = [
        [("q_proj", "k_proj", "v_proj")],
        [("o_proj",)],
        [("gate_proj", "up_proj")],
        [("down_proj",)],
    ]
    assert roles == [*block, *block, [("lm_head",)]]
    assert executor.head_level == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_compute_every_node_once_and_after_its_inputs(family: str, tmp_path: Path) -> None:
    model = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path).model
    linears = find_linears(model)
    levels = node_levels(model.graph, linears)
    groups = group_by_level(linears, levels)
    segments = cut_graph(model.graph, linears, levels, model.graph.outputs[:1])
    assert len(segments) == len(groups) + 1
    linear_nodes = {linear.node for linear in linears}
    weight_nodes = {linear.node.inputs[1].producer() for linear in linears}  # type: ignore[union-attr]
    alive = {str(value.name) for value in model.graph.inputs}
    computed = []
    for level, members in enumerate(segments):
        for index, segment in enumerate(members):
            assert segment.is_attention == (index % 2 == 1)
            given = {str(v.name) for v in segment.inputs if v.const_value is None}
            assert given <= alive, f"level {level} reads values that are dropped or to come"
            computed += segment.nodes
            alive |= {str(value.name) for value in segment.outputs}
            alive -= set(segment.drop)
        for group in groups[level] if level < len(groups) else ():
            for linear in group.linears:
                assert str(linear.input.name) in alive
                alive.add(str(linear.node.outputs[0].name))
    assert len(computed) == len(set(computed))
    assert set(computed) == set(model.graph) - linear_nodes - weight_nodes
