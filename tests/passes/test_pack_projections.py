from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.passes.base import pass_type
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.pack_projections import PackProjections
from eoracc.plugins.operands.weight import NBitsWeight
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

IDS = np.random.default_rng(29).integers(3, VOCABULARY, (2, 10))


def loaded(family: str, work: Path) -> LoadedModel:
    return load(str(tiny_model(family, work / "model")), work=work)


def roles(source: LoadedModel) -> list[str]:
    return [linear.role for linear in find_linears(source.model) if linear.block == 0]


def test_it_is_registered() -> None:
    assert pass_type("pack_projections") is PackProjections


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_graph_equals_eager_model(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    PackProjections().call(source.model)
    check(source.model, Stage.FRONTEND, after="pack_projections")
    assert roles(source) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    session = GraphSession(source.model, tmp_path)
    eager = load_eager(source.folder, {})
    for chunks in ((10,), (7, 1, 1, 1)):
        expected = reference_logits(eager, IDS, chunks=chunks)
        assert_close(session.logits(IDS, chunks=chunks), expected, source.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_model_takes_packed_weights_back(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    PackProjections().call(source.model)
    weights = {linear.name: linear.weight() for linear in find_linears(source.model)}
    own, back = load_eager(source.folder, {}), load_eager(source.folder, weights)
    for (name, left), (_, right) in zip(
        own.named_parameters(), back.named_parameters(), strict=False
    ):
        np.testing.assert_array_equal(left.numpy(), right.numpy(), err_msg=name)


def test_nothing_is_left_to_do_the_second_time(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    PackProjections().call(source.model)
    nodes = list(source.model.graph)
    PackProjections().call(source.model)
    assert list(source.model.graph) == nodes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention": False}, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj"]),
        ({"mlp": False}, ["qkv_proj", "o_proj", "gate_proj", "up_proj"]),
    ],
)
def test_options(tmp_path: Path, options: dict[str, bool], expected: list[str]) -> None:
    source = loaded("llama", tmp_path)
    PackProjections(**options).call(source.model)
    assert roles(source) == [*expected, "down_proj"]


def test_compressed_projections_are_left_alone(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    for linear in find_linears(source.model):
        if linear.role in {"k_proj", "up_proj"}:
            shape = (linear.out_features, linear.in_features)
            linear.quantize(
                NBitsWeight.from_codes(
                    np.zeros(shape, np.uint8),
                    np.ones((shape[0], 3), np.float16),
                    None,
                    bits=4,
                    group_size=16,
                )
            )
    nodes = list(source.model.graph)
    PackProjections().call(source.model)
    assert list(source.model.graph) == nodes


def test_projections_of_different_inputs_are_left_alone(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    queries = find_linears(source.model)[0]
    embedded = next(node for node in source.model.graph if node.op_type == "Gather").outputs[0]
    queries.node.replace_input_with(0, embedded)
    PackProjections().call(source.model)
    assert roles(source)[:3] == ["q_proj", "k_proj", "v_proj"]


def test_weights_are_read_when_they_are_used(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    PackProjections().call(source.model)
    first, second = (find_linears(source.model)[0].weight() for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first is not second
