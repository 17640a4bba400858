"""NVIDIA's own front end for Python plugins, run in a process of its own without TensorRT.

``tensorrt`` needs libraries that no package registry has, its Python part does not: the package
``tensorrt-cu13-bindings`` holds the native module and the module ``tensorrt.plugin``, as NVIDIA
ships them. Here the module is loaded beside libraries that have the few functions it looks for and
do nothing. What would call into them is put in their place, in Python: expressions of sizes, and
the registry of plugins. All else is NVIDIA's: what a plugin's functions must look like, how fields
and types reach them, and what is taken from them.

    python frontend.py FOLDER < request.json > answer.json
"""

from __future__ import annotations

import ctypes
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def ask(folder: Path, request: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    """Run this file on ``request``; ``folder`` may be written to."""
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- in the child process -------------------------------------------------------------------------


class Size:
    """An expression of sizes; stands for ``IDimensionExpr``."""

    def __init__(self, compute: Any, *, constant: bool) -> None:  # noqa: ANN401 - a function
        self.compute = compute
        self.constant = constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return int(self.compute({}))


class Sizes:
    """Stands for ``IExprBuilder``."""

    def __init__(self, operations: dict[Any, Any]) -> None:
        self._operations = operations

    def constant(self, value: int) -> Size:
        return Size(lambda _: value, constant=True)

    def operation(self, which: Any, first: Size, second: Size) -> Size:  # noqa: ANN401 - an enum
        run = self._operations[which]
        return Size(
            lambda sizes: run(first.compute(sizes), second.compute(sizes)),
            constant=first.constant and second.constant,
        )


class Registry:
    """Stands for ``IPluginRegistry``."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:  # noqa: ANN401 - no types
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:  # noqa: ANN401 - no types
        return self.creators[name, version, namespace]


def load_tensorrt(folder: Path) -> Any:  # noqa: ANN401 - no types
    """NVIDIA's package under its usual name, with stand-ins for what its libraries would give."""
    source = folder / "functions.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
        subprocess.run([*command, "-o", str(folder / name), str(source)], check=True)
        ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    trt: Any = importlib.import_module("tensorrt_bindings")
    registry = Registry()
    trt.IDimensionExpr = Size
    trt.ISymExpr = type("ISymExpr", (), {})
    trt.DimsExprs = lambda length: [None] * length
    trt.get_plugin_registry = lambda: registry
    # The module writes a line of its own to standard output when it is loaded.
    trt.Logger = type("Logger", (), {"WARNING": 0, "log": lambda *_: None})
    sys.modules["tensorrt"] = trt
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return trt


def tensor(trt: Any, shape: list[Any], dtype: str) -> Any:  # noqa: ANN401 - no types
    """How a builder describes a tensor: its type, and its smallest, usual and largest shape."""
    described = trt.DynamicPluginTensorDesc()
    described.desc.type = getattr(trt.DataType, dtype)
    described.desc.format = trt.TensorFormat.LINEAR
    ranges = [size if isinstance(size, list) else [size] * 3 for size in shape]
    described.desc.dims = trt.Dims([low if low == high else -1 for low, _, high in ranges])
    described.min, described.opt, described.max = (
        trt.Dims([sizes[index] for sizes in ranges]) for index in range(3)
    )
    return described


def use(trt: Any, request: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - no types
    """Take a plugin through the steps of a build."""
    creator = trt.get_plugin_registry().get_creator(*request["creator"])
    answer: dict[str, Any] = {"fields": [field.name for field in creator.field_names]}
    values = {name: np.array([value], np.int32) for name, value in request["fields"].items()}
    fields = [
        trt.PluginField(name, value, trt.PluginFieldType.INT32) for name, value in values.items()
    ]
    name, _, namespace = request["creator"]
    plugin = creator.create_plugin(
        name,
        namespace,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )
    answer["kind"] = type(plugin).__name__
    described = [tensor(trt, shape, dtype) for shape, dtype in request["inputs"]]
    dtypes = [tensor.desc.type for tensor in described]
    (output_dtype,) = plugin.get_output_data_types(
        dtypes, [len(shape) for shape, _ in request["inputs"]]
    )
    operation = trt.DimensionOperation
    sizes = Sizes(
        {
            operation.SUM: lambda a, b: a + b,
            operation.PROD: lambda a, b: a * b,
            operation.CEIL_DIV: lambda a, b: -(-a // b),
            operation.FLOOR_DIV: lambda a, b: a // b,
            operation.MAX: max,
            operation.MIN: min,
        }
    )
    symbols = [
        [
            sizes.constant(size)
            if isinstance(size, int)
            else Size(lambda given, key=(index, axis): given[key], constant=False)
            for axis, size in enumerate(shape)
        ]
        for index, (shape, _) in enumerate(request["inputs"])
    ]
    (output,) = plugin.get_output_shapes(symbols, [], sizes)
    given = {
        (index, axis): size[1]
        for index, (shape, _) in enumerate(request["inputs"])
        for axis, size in enumerate(shape)
        if isinstance(size, list)
    }
    answer["output"] = [[size.compute(given) for size in output], output_dtype.name]
    usual = tensor(trt, answer["output"][0], output_dtype.name)
    in_out = [*described, usual]
    combinations = plugin.get_supported_format_combinations(in_out, len(described))
    answer["types"] = [combination.type.name for combination in combinations]
    plugin.configure_plugin(described, [usual])
    answer["launches"] = {}
    for tactic in plugin.get_valid_tactics():
        plugin.set_tactic(tactic)
        params = types.SimpleNamespace()
        numbers = type("Numbers", (dict,), {})()
        plugin.get_launch_params(symbols, in_out, len(described), params, numbers, sizes)
        entry, code = plugin.get_kernel(
            [tensor.desc for tensor in described],
            [tensor.desc for tensor in in_out[len(described) :]],
        )
        answer["launches"][tactic] = {
            "entry": entry,
            "code": code.decode(),
            "launch": {
                key: value.expr.compute(given) for key, value in sorted(vars(params).items())
            },
            "numbers": [numbers[index].expr.compute(given) for index in range(len(numbers))],
            "types": [numbers[index].dtype.name for index in range(len(numbers))],
        }
    return answer


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin)
    trt = load_tensorrt(Path(sys.argv[1]))
    plugin = importlib.import_module("eoracc.plugins.tensorrt.plugin")
    try:
        plugin.register(Path(request["bundle"]), request["compute_capability"])
        answers = [use(trt, one) for one in request["uses"]]
    except ValueError as error:
        json.dump({"error": str(error)}, sys.stdout)
        return
    json.dump({"version": trt.__version__, "uses": answers}, sys.stdout)


if __name__ == "__main__":
    main()
