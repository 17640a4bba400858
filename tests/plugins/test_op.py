"""The native library repeats the names of the op: they are those of plugins/op.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eoracc.plugins.op import (
    ACTIVATIONS,
    ADAPTER_INDEX,
    ADAPTER_OPERANDS,
    ATTRIBUTES,
    DOMAIN,
    FUSED_OP,
    GATHER_OP,
    INPUTS,
    REQUIRED,
    TOGETHER,
    Input,
)
from eoracc.plugins.tensorrt.plugin import FIELDS, PLUGIN
from eoracc.plugins.tensorrt.plugin import INPUTS as PLUGIN_INPUTS

SOURCES = Path(__file__).parents[2] / "plugins" / "csrc" / "onnxruntime"


@pytest.fixture(scope="module")
def source() -> str:
    """The C++ source of the op."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cc")])
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def _only(pattern: str, source: str) -> str:
    (found,) = re.findall(pattern, source, re.DOTALL)
    return str(found)


def test_names_are_those_of_the_native_op(source: str) -> None:
    assert _only(r'kDomain = "(\w+)"', source) == DOMAIN
    assert _only(r'kOp = "(\w+)"', source) == FUSED_OP
    assert _only(r'kGatherOp = "(\w+)"', source) == GATHER_OP


def test_inputs_are_those_of_the_native_op(source: str) -> None:
    names = re.findall(r'"(\w+)"', _only(r"kInputNames\[kInputs\] = {(.*?)}", source))
    assert names == list(INPUTS[FUSED_OP])
    positions = re.findall(r"k(\w+),", _only(r"enum Input : size_t {(.*?)kInputs", source))
    assert [name.lower() for name in positions] == [
        name.replace("_", "").lower() for name in INPUTS[FUSED_OP]
    ]
    names = re.findall(r'"(\w+)"', _only(r"kGatherInputNames\[kGatherInputs\] = {(.*?)}", source))
    assert names == list(INPUTS[GATHER_OP])


def test_attributes_are_those_of_the_native_op(source: str) -> None:
    read = re.findall(r'_attribute\(info, "(\w+)"', source)
    assert set(read) == set(ATTRIBUTES[FUSED_OP])
    bodies = (
        _only(rf"Status\* read_{name}_attributes\((.*?)\n}}", source)
        for name in ("weight", "table")
    )
    read = re.findall(r'_attribute\(info, "(\w+)"', "".join(bodies))
    assert set(read) == set(ATTRIBUTES[GATHER_OP])
    activations = re.findall(r'strcmp\(name, "(\w+)"\)', source)
    assert activations == list(ACTIVATIONS)


def test_required_inputs_are_those_of_the_native_op(source: str) -> None:
    last = _only(r"index <= k(\w+) \? kRequired", source)
    assert Input[last.lower()] == REQUIRED - 1


def test_the_plugin_of_tensorrt_takes_part_of_the_op() -> None:
    """It repeats the names, since its file runs where eoracc is not installed."""
    assert f"{DOMAIN}::{FUSED_OP}" == PLUGIN
    assert set(PLUGIN_INPUTS) - {"down"} <= set(INPUTS[FUSED_OP])
    assert set(FIELDS) <= set(ATTRIBUTES[FUSED_OP])


def test_inputs_are_told_apart_by_position() -> None:
    assert [operand.value for operand in Input] == list(range(len(INPUTS[FUSED_OP])))
    assert INPUTS[GATHER_OP][Input.B : Input.zero_points + 1] == INPUTS[FUSED_OP][1:4]
    assert (*ADAPTER_OPERANDS, ADAPTER_INDEX) == INPUTS[FUSED_OP][Input.adapter_a :]
    assert set().union(*TOGETHER) <= set(INPUTS[FUSED_OP])
