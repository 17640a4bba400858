"""The Triton kernels compiled for every capability, without a GPU; none of them is run here."""

from __future__ import annotations

import re
import sys

import pytest

from eoracc.errors import PluginError
from eoracc.plugins.triton.compile import Compiled, compile_down, compile_kernel
from eoracc.plugins.triton.tactics import CAPABILITIES, SHARED_BYTES, Variant, tactics
from tests.optional import require

require("triton")

POINTERS = {"u64", "b64"}
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}


def check(compiled: Compiled) -> None:
    """What whoever launches it relies on."""
    assert compiled.spill_bytes == 0
    assert 0 < compiled.registers <= 255
    assert compiled.shared_bytes <= SHARED_BYTES
    assert compiled.threads == 32 * compiled.num_warps
    assert f".target {compiled.architecture}\n" in compiled.ptx
    assert compiled.cubin.startswith(b"\x7fELF")
    # One kernel, which calls nothing, and its parameters are the arguments.
    assert re.findall(r"\.entry (\w+)\(", compiled.ptx) == [compiled.name]
    assert not re.search(r"\bcall\b|__nv_|\.extern \.func|vprintf", compiled.ptx)
    types = re.findall(r"\.param \.(\w+)[^\n]*_param_\d+", compiled.ptx.split("{")[0])
    assert len(types) == len(compiled.arguments)
    for given, (name, dtype) in zip(types, compiled.arguments, strict=True):
        assert (given in POINTERS) == (dtype != "int32"), name
    # The same on every machine.
    assert "/" not in re.sub(r"//[^\n]*", "", compiled.ptx)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_decoding_kernel_uses_tensor_cores_and_spills_nothing(capability: int, bits: int) -> None:
    variant = Variant(bits=bits, group_size=128, zero_points=True, bias=True, low_rank="one_launch")
    (tactic, *_) = tactics(bits, 128, 1, capability, rank=32)
    assert tactic.down is None
    compiled = compile_kernel(variant, tactic, capability)
    check(compiled)
    assert "mma.sync" in compiled.ptx
    # Codes are copied to shared memory while the step before is multiplied.
    assert "cp.async" in compiled.ptx
    assert [name for name, _ in compiled.arguments] == [
        *("x", "codes", "scales", "zero_points", "bias", "lora_a", "lora_b"),
        *("M", "N", "K", "R", "splits", "y"),
    ]


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_prefill_kernels_use_the_widest_tensor_core_product(capability: int) -> None:
    (tactic, *_) = tactics(4, 64, 512, capability, rank=64)
    assert tactic.down is not None
    variant = Variant(
        bits=4,
        group_size=64,
        dtype="bfloat16",
        scale_dtype="float32",
        factor_dtype="bfloat16",
        low_rank="two_launches",
    )
    compiled = compile_kernel(variant, tactic, capability)
    down = compile_down(tactic.down, capability, dtype="bfloat16", factor_dtype="bfloat16")
    check(compiled)
    check(down)
    assert TENSOR_CORES.get(capability, "mma.sync") in compiled.ptx
    assert [name for name, _ in down.arguments] == ["x", "lora_a", "M", "K", "R", "span", "down"]


def test_largest_rank_in_one_launch_fits() -> None:
    for rows in (1, 512):
        one = [tactic for tactic in tactics(4, 128, rows, 86, rank=256) if tactic.down is None]
        variant = Variant(bits=4, group_size=128, low_rank="one_launch")
        check(compile_kernel(variant, one[0], 86))


def test_what_is_spilled_for_occupancy_is_kept_by_a_limit_of_registers() -> None:
    # ptxas 13.3 stores and loads 8 bytes of this one, at 128 registers, unless that is the limit.
    tactic = tactics(4, 128, 512, 120, rank=64)[1]
    variant = Variant(bits=4, group_size=128, zero_points=True, bias=True, low_rank="two_launches")
    check(compile_kernel(variant, tactic, 120))


def test_weights_in_decoding_go_from_registers_to_tensor_cores() -> None:
    # The down-projection's products are the only ones with both operands from shared memory.
    (tactic, *_) = tactics(4, 128, 1, 80)
    ptx = compile_kernel(Variant(bits=4, group_size=128), tactic, 80).ptx
    # A code is a mantissa under the exponent of 1024: no conversion from integers.
    assert "cvt.rn.f16.u" not in ptx
    assert "st.shared" not in ptx.split("mma.sync")[1]


def test_sizes_that_are_no_multiples_of_16_compile_to_narrower_loads() -> None:
    (tactic, *_) = tactics(8, 64, 1, 80)
    wide = compile_kernel(Variant(bits=8, group_size=64), tactic, 80)
    narrow = compile_kernel(Variant(bits=8, group_size=64, aligned=False), tactic, 80)
    check(narrow)
    assert wide.ptx != narrow.ptx


def test_what_triton_cannot_compile_is_one_sentence() -> None:
    (tactic, *_) = tactics(4, 64, 1, 80)
    with pytest.raises(PluginError, match=r"Triton cannot compile .* for capability 12"):
        compile_kernel(Variant(bits=4, group_size=64), tactic, 12)


def test_missing_triton_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    (tactic, *_) = tactics(4, 1024, 1, 80)
    for name in ("triton", *(name for name in sys.modules if name.startswith("triton."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginError, match=r"run pip install 'eoracc\[triton\]'"):
        compile_kernel(Variant(bits=4, group_size=1024), tactic, 80)
