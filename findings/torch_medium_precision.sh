#!/usr/bin/env bash
# torch 2.13.0: set_float32_matmul_precision("medium") changes nothing on a CPU without AMX.
#
# Behaviour: the documentation lets "medium" compute float32 matrix products in bfloat16 "if a fast
# matrix multiplication algorithm using that datatype internally is available". On a CPU without AMX
# none is: the product equals that with "highest" bit for bit, while
# get_float32_matmul_precision() still returns "medium". The caller is not told.
#
# Seen: torch 2.13.0+cpu, Python 3.11.7, AMD EPYC with AVX2, no AVX-512 and no AMX:
#   torch 2.13.0+cpu, AVX2, AMX False
#   size   64: 'medium' equals 'highest' True, error 1.1e-05, of bfloat16 operands 1.0e-01
#   size  256: 'medium' equals 'highest' True, error 2.4e-05, of bfloat16 operands 2.0e-01
#   size 1024: 'medium' equals 'highest' True, error 6.2e-05, of bfloat16 operands 3.6e-01
#
# Why it matters: a program that means bfloat16 gives other numbers on two machines. Rounding the
# operands to bfloat16 first gives the same precision on all of them.
#
# Usage: findings/torch_medium_precision.sh
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PROGRAM'
import sys

import torch

amx = torch.cpu._is_amx_tile_supported()
print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, AMX {amx}")
generator = torch.Generator().manual_seed(0)
same = []
for size in (64, 256, 1024):
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    torch.set_float32_matmul_precision("highest")
    highest = a @ b
    torch.set_float32_matmul_precision("medium")
    medium = a @ b
    assert torch.get_float32_matmul_precision() == "medium"
    rounded = a.bfloat16().float() @ b.bfloat16().float()
    same.append(torch.equal(medium, highest))
    error, of_bfloat16 = ((product - exact).abs().max().item() for product in (medium, rounded))
    print(
        f"size {size:4}: 'medium' equals 'highest' {same[-1]}, error {error:.1e}, "
        f"of bfloat16 operands {of_bfloat16:.1e}"
    )
# With AMX it may be either, by size.
if not amx and not all(same):
    sys.exit("the finding no longer holds: 'medium' changes products without AMX")
PROGRAM
