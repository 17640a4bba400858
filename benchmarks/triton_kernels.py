"""Compile the Triton kernels without a GPU; print their resources and the bounds for GPUs.

    python benchmarks/triton_kernels.py [--json FILE]

Registers, spills and shared memory come from ptxas; occupancy and the roofline follow from
published figures (``gpus.py``). Nothing runs on a GPU and nothing is timed. Linears are those of
one block of Llama-3-8B (``shapes.json``), 4 bits in groups of 128.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A script that runs by its path can import from its own folder only.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.gpus import GPUS, Product, bound, occupancy
from eoracc.plugins.triton.compile import Compiled, compile_down, compile_kernel
from eoracc.plugins.triton.tactics import CAPABILITIES, LowRankForm, Variant, tactics

SHAPES = Path(__file__).with_name("shapes.json")
MODEL = "Llama-3-8B"
LINEARS = ("qkv", "o", "gate_up", "down")
ROWS = (1, 16, 512)
GROUP = 128
RANK = 64
ONE_LAUNCH_RANKS = (16, 32, 64)

Row = dict[str, Any]


def resources() -> Iterator[Row]:
    """The first tactic of each form for each capability, width and number of rows."""
    for capability in CAPABILITIES:
        for bits in (2, 3, 4, 8):
            for rows in ROWS if bits == 4 else ROWS[:1]:
                listed = tactics(bits, GROUP, rows, capability, rank=RANK)
                forms: dict[LowRankForm, Any] = {
                    "one_launch": next(tactic for tactic in listed if tactic.down is None),
                    "two_launches": next(tactic for tactic in listed if tactic.down is not None),
                }
                for form, tactic in forms.items():
                    variant = Variant(bits=bits, group_size=GROUP, low_rank=form)
                    compiled = compile_kernel(variant, tactic, capability)
                    yield _row(compiled, bits=bits, rows=rows, form=form, tactic=tactic.name)
                    if tactic.down is not None and bits == 4:
                        down = compile_down(tactic.down, capability)
                        tiles = f"m{tactic.down.block_m}_r{tactic.down.block_r}"
                        yield _row(down, bits=0, rows=rows, form="down", tactic=tiles)


def _row(compiled: Compiled, **described: Any) -> Row:
    return {
        "capability": compiled.capability,
        **described,
        "registers": compiled.registers,
        "spill_bytes": compiled.spill_bytes,
        "shared_bytes": compiled.shared_bytes,
        "occupancy": occupancy(
            compiled.capability,
            num_warps=compiled.num_warps,
            registers=compiled.registers,
            shared_bytes=compiled.shared_bytes,
        ),
    }


def products(rows: int, bits: int, rank: int) -> dict[str, Product]:
    """The linears of a block."""
    shapes = json.loads(SHAPES.read_text(encoding="utf-8"))[MODEL]
    return {
        name: Product(
            rows, sum(shapes[name]["parts"]), shapes[name]["in_features"], bits, GROUP, rank
        )
        for name in LINEARS
    }


def rooflines() -> Iterator[Row]:
    """Bounds of each linear on each GPU, next to a float16 weight without a low-rank term."""
    for gpu in GPUS:
        for rows in ROWS:
            plain = products(rows, 16, 0)
            for name, product in products(rows, 4, RANK).items():
                expected = bound(gpu, product)
                yield {
                    "gpu": gpu.name,
                    "capability": gpu.capability,
                    "linear": name,
                    "rows": rows,
                    "bytes": product.bytes,
                    "flops": product.flops,
                    "seconds": expected.seconds,
                    "bound_by": expected.by,
                    "float16_seconds": bound(gpu, plain[name]).seconds,
                }


def launches() -> Iterator[Row]:
    """Bounds of one row through ``o``, with one launch and with a separate down-projection."""
    for gpu in GPUS:
        for rank in ONE_LAUNCH_RANKS:
            product = products(1, 4, rank)["o"]
            listed = tactics(4, GROUP, 1, gpu.capability, rank=rank)
            tactic = next(tactic for tactic in listed if tactic.down is None)
            fused = bound(gpu, product, block_m=tactic.block_m, block_n=tactic.block_n)
            yield {
                "gpu": gpu.name,
                "rank": rank,
                "one_launch_seconds": fused.seconds,
                "bound_by": fused.by,
                "two_launches_seconds": bound(gpu, product).seconds,
            }


def _show(title: str, header: str, lines: Iterator[str]) -> None:
    columns = header.count("|") + 1
    sys.stdout.write(f"\n{title}\n\n| {header} |\n|{'---|' * columns}\n")
    for line in lines:
        sys.stdout.write(f"| {line} |\n")


def _show_resources(found: list[Row]) -> None:
    by_kernel: dict[tuple[str, int, int], list[Row]] = {}
    for row in found:
        by_kernel.setdefault((row["form"], row["bits"], row["rows"]), []).append(row)

    def line(form: str, bits: int, rows: int, each: list[Row]) -> str:
        cells = (
            f"{row['registers']}, {row['shared_bytes'] / 1024:.0f}, {row['occupancy']:.0%}"
            for row in each
        )
        return f"{form.replace('_', ' ')} | {bits or ''} | {rows} | {' | '.join(cells)}"

    header = "kernel | bits | M | " + " | ".join(
        f"{capability / 10:.1f}" for capability in CAPABILITIES
    )
    title = (
        f"Registers of a thread, KiB of shared memory, occupancy, by capability; rank {RANK}. "
        f"Bytes spilled by all {len(found)} kernels: {sum(row['spill_bytes'] for row in found)}"
    )
    _show(title, header, (line(*kernel, each) for kernel, each in sorted(by_kernel.items())))


def _show_rooflines(found: list[Row]) -> None:
    header = "GPU | M | " + " | ".join(LINEARS) + " | a block | float16 weights"
    by_case: dict[tuple[str, int], list[Row]] = {}
    for row in found:
        by_case.setdefault((row["gpu"], row["rows"]), []).append(row)

    def line(gpu: str, rows: int, linears: list[Row]) -> str:
        cells = (f"{row['seconds'] * 1e6:.1f} {row['bound_by'][0]}" for row in linears)
        total = sum(row["seconds"] for row in linears)
        plain = sum(row["float16_seconds"] for row in linears)
        return (
            f"{gpu} | {rows} | {' | '.join(cells)} | {total * 1e6:.1f} | "
            f"{plain * 1e6:.1f} ({plain / total:.1f} x)"
        )

    lines = (line(*case, linears) for case, linears in by_case.items())
    _show(f"Least µs at 4 bits, rank {RANK} (m: memory, t: tensor cores)", header, lines)
    header = "linear | M | MB | GFLOP | FLOP / byte"
    first = (row for row in found if row["gpu"] == GPUS[0].name)
    lines = (
        f"{row['linear']} | {row['rows']} | {row['bytes'] / 1e6:.2f} | {row['flops'] / 1e9:.3f} | "
        f"{row['flops'] / row['bytes']:.0f}"
        for row in first
    )
    _show("What is read, written and computed", header, lines)


def _show_launches(found: list[Row]) -> None:
    header = "GPU | rank | one launch | bound by | two launches, without launch overhead"
    lines = (
        f"{row['gpu']} | {row['rank']} | {row['one_launch_seconds'] * 1e6:.1f} | "
        f"{row['bound_by']} | {row['two_launches_seconds'] * 1e6:.1f}"
        for row in found
    )
    _show("Least µs of one row through `o`", header, lines)


def main() -> None:
    """Print the tables, and write them as JSON if a file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    tables = {
        "resources": list(resources()),
        "rooflines": list(rooflines()),
        "launches": list(launches()),
    }
    _show_resources(tables["resources"])
    _show_rooflines(tables["rooflines"])
    _show_launches(tables["launches"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(tables, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
