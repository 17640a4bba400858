"""``eoracc::MatMulNBitsLowRank`` as a plugin of TensorRT, in one file that needs TensorRT alone.

This file is part of every bundle (the folder ``tensorrt`` of an artifact), beside the kernels that
it tells TensorRT of: PTX, compiled ahead of time, with a table of them in kernels.json. It is run
where an engine is built, and only there::

    import tensorrt as trt
    from plugin import register

    register(Path("bundle"), "8.9")          # once a process, before the graph is parsed
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    trt.OnnxParser(network, logger).parse_from_file("bundle/model.onnx")

TensorRT times every *tactic*, a kernel with tiles of its own, on the shapes of each optimization
profile and puts the PTX of the fastest into the engine, with its grid as expressions of the
shapes. So an engine runs without this file and without Python.

A plugin of this kind has no optional inputs. What a linear does without is a scalar in its place,
which no kernel reads. The low-rank term comes in two ways: with ``lora_a`` one launch computes all
of it; with ``down``, which is ``X lora_a^T``, the graph has computed the first half.

=============  ==============================  ==================================================
input          type                            shape
=============  ==============================  ==================================================
X              float16, bfloat16               ``[..., K]``
B              int8, the bytes of docs/op.md   ``[N, ceil(K / block_size), block_size * bits / 8]``
scales         as X                            ``[N, ceil(K / block_size)]``
zero_points    int8, the bytes of docs/op.md   ``[N, ceil(K / block_size)]``, or a scalar
bias           as X                            ``[N]``, or a scalar
lora_a         as X                            ``[R, K]``, or a scalar
down           as X                            ``[..., R]``, or a scalar
lora_b         as X                            ``[N, R]``, or a scalar
Y              as X                            ``[..., N]``
=============  ==============================  ==================================================

``R`` is a multiple of 16. The fields are the op's: ``K``, ``N``, ``bits``, ``block_size``.
"""

# Annotations are evaluated on purpose: TensorRT reads which arguments are tensors off them.

import json
from pathlib import Path
from typing import Any

__all__ = ["FIELDS", "INPUTS", "KERNELS_FILE", "PLUGIN", "PLUGIN_VERSION", "Kernels", "register"]

PLUGIN = "eoracc::MatMulNBitsLowRank"
"""Namespace and name, as TensorRT knows the plugin."""

PLUGIN_VERSION = "1"

INPUTS = ("X", "B", "scales", "zero_points", "bias", "lora_a", "down", "lora_b")
FIELDS = ("K", "N", "bits", "block_size")

KERNELS_FILE = "kernels.json"

_FORMAT = "eoracc kernels"
_SCHEMA = 1

_ALIGNMENT = 16
"""Kernels that are ``aligned`` take a K that is a multiple of it."""

Kernel = dict[str, Any]


class Kernels:
    """The kernels of a bundle that run on GPUs of one compute capability."""

    def __init__(self, folder: Path, compute_capability: str) -> None:
        """Read kernels.json.

        Args:
          folder: of the bundle.
          compute_capability: of the GPU, ``8.6`` for example. PTX of a lower one stands in where it
            has none of its own, unless that uses what only its own architecture has.

        Raises:
          ValueError: the table is of another format, or has no kernel for this GPU.
        """
        content = json.loads((folder / KERNELS_FILE).read_text(encoding="utf-8"))
        if (content.get("format"), content.get("schema")) != (_FORMAT, _SCHEMA):
            raise ValueError(f"{folder / KERNELS_FILE}: is no table of kernels that this can read")
        self._folder = folder
        self.compute_capability = _nearest(content["kernels"], compute_capability)
        if self.compute_capability is None:
            known = sorted({kernel["compute_capability"] for kernel in content["kernels"]})
            raise ValueError(
                f"{folder / KERNELS_FILE}: has no kernel for compute capability "
                f"{compute_capability}, only for {', '.join(known)}"
            )
        self._kernels: list[Kernel] = [
            kernel
            for kernel in content["kernels"]
            if kernel["compute_capability"] == self.compute_capability
        ]

    def fitting(self, case: dict[str, Any]) -> dict[int, Kernel]:
        """Kernels that compute ``case``, by their tactic.

        Args:
          case: as in kernels.json; ``rank`` is the largest that the kernel has to take.

        Raises:
          ValueError: there is none.
        """
        found: dict[int, Kernel] = {}
        for kernel in self._kernels:
            same = all(kernel[key] == value for key, value in case.items() if key != "rank")
            if same and case["rank"] <= kernel["rank"]:
                # Of one tactic the kernel whose tiles the rank fills best.
                best = found.get(kernel["tactic"])
                if best is None or kernel["rank"] < best["rank"]:
                    found[kernel["tactic"]] = kernel
        if not found:
            raise ValueError(f"{self._folder / KERNELS_FILE}: has no kernel for {case}")
        return found

    def ptx(self, kernel: Kernel) -> bytes:
        """The code of ``kernel``.

        Raises:
          ValueError: its file is not beside kernels.json.
        """
        path: Path = self._folder / kernel["file"]
        if path.name != kernel["file"] or path.is_symlink():
            raise ValueError(f"{self._folder / KERNELS_FILE}: names {kernel['file']!r}, elsewhere")
        return path.read_bytes()


def _nearest(kernels: list[Kernel], compute_capability: str) -> str | None:
    """The highest capability whose PTX a GPU takes."""
    own = _numbers(compute_capability)
    taken = {
        kernel["compute_capability"]
        for kernel in kernels
        if _numbers(kernel["compute_capability"]) == own
        or (kernel["forward_compatible"] and _numbers(kernel["compute_capability"]) < own)
    }
    return max(taken, key=_numbers, default=None)


def _numbers(compute_capability: str) -> tuple[int, int]:
    major, _, minor = compute_capability.partition(".")
    return int(major), int(minor)


def register(folder: Path, compute_capability: str) -> None:
    """Register the plugin with TensorRT, once a process.

    Args:
      folder: of the bundle.
      compute_capability: of the GPU that the engine is built for.

    Raises:
      ImportError: TensorRT is not installed.
      ValueError: the bundle has no kernels for this GPU.
    """
    import tensorrt as trt  # noqa: PLC0415 - needed where engines are built, and nowhere else
    import tensorrt.plugin as trtp  # noqa: PLC0415

    kernels = Kernels(folder, compute_capability)
    dtypes = {trt.DataType.HALF: ("float16", "FP16"), trt.DataType.BF16: ("bfloat16", "BF16")}

    def fitting(
        inputs: list[trtp.TensorDesc], columns: int, bits: int, block_size: int
    ) -> dict[int, Kernel]:
        x, codes, _, zero_points, bias, lora_a, down, lora_b = inputs
        if x.dtype not in dtypes:
            raise ValueError(f"{PLUGIN}: X is {x.dtype}: it must be float16 or bfloat16")
        for name, tensor in (("B", codes), ("zero_points", zero_points)):
            if tensor.dtype != trt.DataType.INT8:
                raise ValueError(f"{PLUGIN}: {name} is {tensor.dtype}: its bytes must be INT8")
        for name, tensor in zip(INPUTS, inputs, strict=True):
            if name not in ("B", "zero_points") and tensor.dtype != x.dtype:
                raise ValueError(f"{PLUGIN}: {name} is {tensor.dtype}: it must be {x.dtype}, as X")
        return kernels.fitting(
            {
                "dtype": dtypes[x.dtype][0],
                "bits": bits,
                "block_size": block_size,
                "zero_points": bool(zero_points.ndim),
                "bias": bool(bias.ndim),
                "lora_a": bool(lora_a.ndim),
                "down": bool(down.ndim),
                "aligned": columns % _ALIGNMENT == 0,
                "rank": lora_b.shape[1] if lora_b.ndim else 0,
            }
        )

    # The names are the op's, by which TensorRT matches fields; each function takes all of them.
    # ruff: noqa: ARG001
    @trtp.register(PLUGIN)  # type: ignore[untyped-decorator]
    def describe(
        X: trtp.TensorDesc,
        B: trtp.TensorDesc,
        scales: trtp.TensorDesc,
        zero_points: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        lora_a: trtp.TensorDesc,
        down: trtp.TensorDesc,
        lora_b: trtp.TensorDesc,
        K: int,
        N: int,
        bits: int,
        block_size: int,
    ) -> trtp.TensorDesc:
        y = X.like()
        y.shape_expr[len(y.shape_expr) - 1] = N
        return y

    @trtp.autotune(PLUGIN)  # type: ignore[untyped-decorator]
    def list_tactics(
        X: trtp.TensorDesc,
        B: trtp.TensorDesc,
        scales: trtp.TensorDesc,
        zero_points: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        lora_a: trtp.TensorDesc,
        down: trtp.TensorDesc,
        lora_b: trtp.TensorDesc,
        K: int,
        N: int,
        bits: int,
        block_size: int,
        outputs: tuple[trtp.TensorDesc],
    ) -> list[trtp.AutoTuneCombination]:
        inputs = [X, B, scales, zero_points, bias, lora_a, down, lora_b]
        tactics = sorted(fitting(inputs, K, bits, block_size))
        types = ["INT8" if name in ("B", "zero_points") else dtypes[X.dtype][1] for name in INPUTS]
        types.append(dtypes[X.dtype][1])
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", tactics)]

    @trtp.aot_impl(PLUGIN)  # type: ignore[untyped-decorator]
    def launch(
        X: trtp.TensorDesc,
        B: trtp.TensorDesc,
        scales: trtp.TensorDesc,
        zero_points: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        lora_a: trtp.TensorDesc,
        down: trtp.TensorDesc,
        lora_b: trtp.TensorDesc,
        K: int,
        N: int,
        bits: int,
        block_size: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        inputs = [X, B, scales, zero_points, bias, lora_a, down, lora_b]
        kernel = fitting(inputs, K, bits, block_size)[tactic]
        rows = trtp.ShapeExpr(1)
        for axis in range(X.ndim - 1):
            rows = rows * X.shape_expr[axis]
        sizes = {
            "M": rows,
            "N": trtp.ShapeExpr(N),
            "K": trtp.ShapeExpr(K),
            "R": lora_b.shape_expr[1] if lora_b.ndim else trtp.ShapeExpr(0),
        }
        params = trtp.KernelLaunchParams()
        params.grid_x, params.grid_y, params.grid_z = (
            trtp.cdiv(sizes[size], step) if size in sizes else trtp.ShapeExpr(1)
            for size, step in kernel["grid"]
        )
        params.block_x = kernel["threads"]
        params.shared_mem = kernel["shared_bytes"]
        numbers = trtp.SymIntExprs(len(kernel["numbers"]))
        for index, name in enumerate(kernel["numbers"]):
            numbers[index] = trtp.SymInt32(sizes.get(name, name))
        return kernel["entry"], kernels.ptx(kernel), params, numbers
