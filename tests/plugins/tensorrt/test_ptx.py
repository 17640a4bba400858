from __future__ import annotations

import re

import pytest

from eoracc.errors import PluginError
from eoracc.plugins.tensorrt.ptx import launch_form

PTX = """.version 8.8
.target sm_80
\t// .globl\tproduct   // -- Begin function product
.visible .entry product(
\t.param .u64 .ptr .global .align 1 product_param_0,
\t.param .u64 .ptr .global .align 1 product_param_1,
\t.param .u32 product_param_2,
\t.param .u64 .ptr .global .align 1 product_param_3
)
.reqntid 128
{
\tld.param.b64 %rd1, [product_param_1];
\tld.param.b32 %r1, [product_param_2];
\tld.param.b64 %rd2, [product_param_3];
\tret;
}
"""


def parameters(ptx: str) -> list[str]:
    entry = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
    assert entry is not None
    return [re.split(r"\s+", line.rstrip(","))[-1] for line in entry[1].split("\n")]


def test_absent_operands_are_declared_in_their_places() -> None:
    arranged = launch_form(PTX, entry="mine", present=[True, False, True, False])
    assert parameters(arranged) == [
        "mine_param_0",
        "mine_without_1",
        "mine_param_1",
        "mine_without_3",
        "mine_param_2",
        "mine_param_3",
    ]


def test_instructions_stay_as_they_are() -> None:
    arranged = launch_form(PTX, entry="mine", present=[False, True, True])
    before, after = (text[text.index(".reqntid") :] for text in (PTX, arranged))
    assert after == before.replace("product", "mine")
    assert "product" not in arranged


@pytest.mark.parametrize("present", [[True] * 3, [True, True, True, False]])
def test_fewer_pointers_than_inputs_are_refused(present: list[bool]) -> None:
    with pytest.raises(PluginError, match="mine: its PTX does not begin with 3 pointers"):
        launch_form(PTX, entry="mine", present=present)


@pytest.mark.parametrize(("ptx", "count"), [("", 0), (PTX + PTX, 2)])
def test_other_numbers_of_kernels_are_refused(ptx: str, count: int) -> None:
    with pytest.raises(PluginError, match=f"has {count} kernels where one is launched"):
        launch_form(ptx, entry="mine", present=[True, True])
