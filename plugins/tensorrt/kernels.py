"""Compile the kernels of a bundle and write the table from which the plugin selects them.

kernels.json lists each kernel with its *case* (types, bits, group size, operands), its launch and
the file of its PTX::

    {"format": "eoracc kernels", "schema": 1, "kernels": [
      {"compute_capability": "8.0", "forward_compatible": true,
       "dtype": "float16", "bits": 4, "block_size": 64, "zero_points": false,
       "bias": false, "lora_a": false, "down": true, "aligned": true, "rank": 256,
       "tactic": 1, "entry": "eoracc_…", "file": "sm80_….ptx", "threads": 128,
       "shared_bytes": 12288, "grid": [["M", 16], ["N", 32], [1, 1]],
       "numbers": ["M", "N", "K", "R", 1]}]}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eoracc.errors import PluginError
from eoracc.plugins.tensorrt.plugin import INPUTS, KERNELS_FILE
from eoracc.plugins.tensorrt.ptx import launch_form
from eoracc.plugins.triton.compile import Compiled, compile_kernel
from eoracc.plugins.triton.tactics import (
    FEW_RANKS,
    LARGEST_RANK,
    SHARED_BYTES,
    Tactic,
    Variant,
    tactics,
)

__all__ = ["Case", "count_kernel_sets", "in_one_launch", "write_kernels"]

_LARGEST_STEP = 64
"""Largest step along R of kernels with ``down``: beyond it, one kernel serves every rank."""

_NUMBERS = ("M", "N", "K", "R", 1)
"""Integers that a launch passes after its inputs; the last is the number of parts of ``down``."""

_ROLES = {
    "x": "X",
    "codes": "B",
    "scales": "scales",
    "zero_points": "zero_points",
    "bias": "bias",
    "lora_a": "lora_a",
    "down": "down",
    "lora_b": "lora_b",
}
"""Inputs of the plugin by argument of the Triton kernel."""


def in_one_launch(rank: int) -> bool:
    """Whether one launch should compute the whole low-rank term.

    The graph fixes this for all numbers of rows. With few ranks, decoding gains more by one launch
    than prefill loses.
    """
    return 0 < rank <= FEW_RANKS


@dataclass(frozen=True, kw_only=True)
class Case:
    """The computation of a kernel, apart from its sizes; the linears of a model share a few.

    Attributes:
      dtype: type of X, scales, factors and Y.
      bits: code width.
      block_size: codes per scale.
      zero_points: whether there are zero points.
      bias: whether there is a bias.
      lora_a: whether one launch computes the low-rank term.
      down: whether the first half of the low-rank term is an input.
      aligned: whether K is a multiple of 16.
      rank: largest rank of the low-rank term, 0 without one.
    """

    dtype: Literal["float16", "bfloat16"]
    bits: int
    block_size: int
    zero_points: bool
    bias: bool
    lora_a: bool
    down: bool
    aligned: bool
    rank: int

    def __post_init__(self) -> None:
        """Check the rank.

        Raises:
          PluginError: no kernel supports it.
        """
        if not 0 <= self.rank <= LARGEST_RANK or self.rank % 16:
            raise PluginError(
                f"rank is {self.rank}: the plugin's kernels take multiples of 16 up to "
                f"{LARGEST_RANK}"
            )

    @property
    def variant(self) -> Variant:
        """The variant of the Triton kernel that computes this.

        Raises:
          PluginError: no kernel computes this.
        """
        return Variant(
            bits=self.bits,
            group_size=self.block_size,
            dtype=self.dtype,
            scale_dtype=self.dtype,
            factor_dtype=self.dtype,
            down_dtype=self.dtype,
            zero_points=self.zero_points,
            bias=self.bias,
            low_rank="one_launch" if self.lora_a else "two_launches" if self.down else "none",
            aligned=self.aligned,
        )


def write_kernels(
    folder: Path,
    cases: Iterable[Case],
    *,
    compute_capabilities: Sequence[str],
    rows: Sequence[int],
    advance: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Compile the kernels for ``cases`` and write them, with their table, into ``folder``.

    Args:
      folder: the bundle.
      cases: those of all linears of a model; equal ones count once.
      compute_capabilities: those of the GPUs, ``8.6`` for example.
      rows: numbers of rows to tile for; every kernel accepts any number.
      advance: called after each case and capability, with a text for progress.

    Returns:
      Names of the files written.

    Raises:
      PluginError: Triton is missing, or no kernel computes a case.
    """
    listed: list[dict[str, Any]] = []
    for capability in compute_capabilities:
        for case in _distinct(cases):
            kernels = _compile_case(case, capability, rows)
            for tactic, (compiled, chosen) in enumerate(kernels, 1):
                name = f"{_name(case)}_{chosen.name}"
                entry = f"eoracc_sm{compiled.capability}_{name}"
                file = f"sm{compiled.capability}_{name}.ptx"
                roles = {
                    _ROLES[argument] for argument, _ in compiled.arguments if argument in _ROLES
                }
                text = launch_form(
                    compiled.ptx, entry=entry, present=[role in roles for role in INPUTS]
                )
                (folder / file).write_text(text, encoding="utf-8")
                listed.append(
                    {
                        "compute_capability": capability,
                        "forward_compatible": not compiled.architecture.endswith("a"),
                        **asdict(case),
                        "tactic": tactic,
                        "entry": entry,
                        "file": file,
                        "threads": compiled.threads,
                        "shared_bytes": compiled.shared_bytes,
                        "grid": [["M", chosen.block_m], ["N", chosen.block_n], [1, 1]],
                        "numbers": list(_NUMBERS),
                    }
                )
            advance(f"{capability} {_name(case)}")
    content = {"format": "eoracc kernels", "schema": 1, "kernels": listed}
    (folder / KERNELS_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [KERNELS_FILE, *(kernel["file"] for kernel in listed)]


def count_kernel_sets(cases: Iterable[Case], compute_capabilities: Sequence[str]) -> int:
    """Number of times that :func:`write_kernels` calls ``advance``."""
    return len(_distinct(cases)) * len(compute_capabilities)


def _distinct(cases: Iterable[Case]) -> list[Case]:
    """The cases to compile: a kernel also accepts lower ranks than its own."""

    def covering(case: Case) -> Case:
        rank = 1 << (case.rank - 1).bit_length() if case.rank else 0
        return replace(case, rank=LARGEST_RANK if case.down and rank >= _LARGEST_STEP else rank)

    return sorted({covering(case) for case in cases}, key=repr)


def _compile_case(
    case: Case, compute_capability: str, rows: Sequence[int]
) -> list[tuple[Compiled, Tactic]]:
    capability = int(compute_capability.replace(".", ""))
    # The graph computes ``down``, so tactics that differ only there are equal.
    wanted = {
        replace(tactic, down=None): None
        for count in rows
        for tactic in tactics(case.bits, case.block_size, count, capability, rank=case.rank)
        if (tactic.down is not None) == case.down
    }
    compiled = [(compile_kernel(case.variant, tactic, capability), tactic) for tactic in wanted]
    usable = [
        (kernel, tactic)
        for kernel, tactic in compiled
        if kernel.shared_bytes <= SHARED_BYTES and not kernel.spill_bytes
    ]
    if not usable:
        raise PluginError(f"{_name(case)}: no kernel for {compute_capability} fits its GPU")
    return usable


def _name(case: Case) -> str:
    """A short name, unique to the case."""
    words = [f"w{case.bits}g{case.block_size}", {"float16": "f16", "bfloat16": "bf16"}[case.dtype]]
    words += [word for word in ("zero_points", "bias", "lora_a", "down") if getattr(case, word)]
    if case.rank:
        words.append(f"r{case.rank}")
    if not case.aligned:
        words.append("unaligned")
    return "_".join(words)
