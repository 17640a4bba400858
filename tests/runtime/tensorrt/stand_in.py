"""A stand-in for TensorRT: the slice of its interface that the runtime uses, over ONNX Runtime.

What it calls an engine is a JSON text that names an ONNX file; a call reads its inputs from the
addresses that were set, runs that graph with ONNX Runtime on the CPU, and writes its outputs to
theirs. The memory is that of ``libcuda_stand_in.c``: host memory. Nothing of this has seen a GPU;
``test_stand_in.py`` holds the interface against the real package.

It refuses what TensorRT refuses, and says so the same way: a call returns False and logs why.
"""

from __future__ import annotations

import ctypes
import enum
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime

from eoracc.runtime.onnxruntime.float32_twin import float32_twin
from eoracc.runtime.tensorrt.dtypes import from_engine, storage_type, to_engine
from eoracc.runtime.tensorrt.engine_set import (
    ENGINES_FILE,
    Binding,
    EngineFile,
    EngineSet,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

__all__ = [
    "VERSION",
    "IExecutionContext",
    "RefusedError",
    "make_tensorrt",
    "open_graph",
    "write_engines",
]

VERSION = "1.7.1.116"
_ALIGNMENT = 256


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    LAZY = 0
    NONE = 2


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            content = json.loads(serialized_engine)
            return ICudaEngine(self.logger, content)
        except (ValueError, KeyError) as error:
            reason = f"Magic tag does not match:\n{error}"
            self.logger.log(ILogger.Severity.ERROR, reason)
            return None


class IRuntimeConfig:
    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = (
            DynamicShapesKernelSpecializationStrategy.LAZY
        )

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy


class ICudaEngine:
    def __init__(self, logger: ILogger, content: Mapping[str, Any]) -> None:
        self.logger = logger
        self.library = ctypes.CDLL(content["libcuda"])
        self.library.stand_in_contains.argtypes = (ctypes.c_uint64, ctypes.c_size_t)
        self.profiles = [
            {name: tuple(sizes) for name, sizes in dims.items()} for dims in content["profiles"]
        ]
        self.bindings = {
            one["name"]: Binding(one["name"], one["mode"], one["dtype"], tuple(one["shape"]))
            for one in content["bindings"]
        }
        self.session = open_graph(content["graph"])
        self.contexts: list[IExecutionContext] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.bindings)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        name: str = list(self.bindings)[index]
        return name

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, runtime_config: IRuntimeConfig | None = None
    ) -> IExecutionContext:
        context = IExecutionContext(self, runtime_config or IRuntimeConfig())
        self.contexts.append(context)
        return context


class RefusedError(Exception):
    """What TensorRT would log before it returns False."""


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self.engine = engine
        self.config = config
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[dict[str, int]] = []

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return self._try(self._set_profile, profile_index, stream_handle)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._try(self._set_shape, name, shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        return self._try(self._set_address, name, memory)

    def execute_async_v3(self, stream_handle: int) -> bool:
        return self._try(self._execute, stream_handle)

    def _try(self, action: Callable[..., None], *arguments: object) -> bool:
        try:
            action(*arguments)
        except RefusedError as error:
            self.engine.logger.log(ILogger.Severity.ERROR, str(error))
            return False
        return True

    def _set_profile(self, index: int, stream: int) -> None:
        taken = any(one.profile == index for one in self.engine.contexts)
        if taken or not stream or index >= len(self.engine.profiles):
            raise RefusedError(f"profile {index} cannot be set")
        self.profile = index

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        binding = self.engine.bindings.get(name)
        if self.profile is None or binding is None or binding.mode != "input":
            raise RefusedError(f"no shape can be set of {name}")
        if len(shape) != len(binding.shape):
            raise RefusedError(f"{name} has {len(binding.shape)} dimensions")
        for size, declared in zip(shape, binding.shape, strict=True):
            low, high = declared, declared
            if isinstance(declared, str):
                low, _, high = self.engine.profiles[self.profile][declared]
            if not int(low) <= size <= int(high):
                raise RefusedError(f"{name} {shape}: {declared} is not in {low}..{high}")
        self.shapes[name] = shape

    def _set_address(self, name: str, memory: int) -> None:
        if name not in self.engine.bindings or not memory or memory % _ALIGNMENT:
            raise RefusedError(f"{name} cannot be at {memory}")
        self.addresses[name] = memory

    def _execute(self, stream: int) -> None:
        if not stream:
            raise RefusedError("the default stream")
        session = self.engine.session
        dims: dict[str, int] = {}
        feeds = {}
        for one in session.get_inputs():
            binding = self.engine.bindings[one.name]
            if one.name not in self.shapes:
                raise RefusedError(f"{one.name} has no shape")
            shape = self.shapes[one.name]
            for size, declared in zip(shape, binding.shape, strict=True):
                if isinstance(declared, str) and dims.setdefault(declared, size) != size:
                    raise RefusedError(f"{declared} is {size} in {one.name}")
            feeds[one.name] = _cast(self._memory(binding, shape), binding.dtype, one.type)
        self.calls.append(dims)
        names = [one.name for one in session.get_outputs()]
        for name, result in zip(names, session.run(None, feeds), strict=True):
            binding = self.engine.bindings[name]
            self._check_cache(name)
            self._memory(binding, result.shape)[...] = _uncast(result, binding.dtype)

    def _check_cache(self, name: str) -> None:
        """A cache in place is written where it is read, another one is not."""
        past = name.replace("present.", "past_key_values.")
        if past == name:
            return
        in_place = not isinstance(self.engine.bindings[past].shape[2], str)
        if in_place != (self.addresses[name] == self.addresses[past]):
            raise RefusedError(f"{name} cannot be at {self.addresses[name]}")

    def _memory(self, binding: Binding, shape: Sequence[int]) -> NDArray[Any]:
        """The array at a binding's address, which must be memory that is allocated."""
        dtype = storage_type(binding.dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        address = self.addresses.get(binding.name)
        if address is None:
            raise RefusedError(f"{binding.name} has no address")
        if not self.engine.library.stand_in_contains(address, nbytes):
            raise RefusedError(f"{binding.name} {shape} at {address} is not in memory")
        buffer = (ctypes.c_ubyte * nbytes).from_address(address)
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)


def _cast(array: NDArray[Any], dtype: str, wanted: str) -> NDArray[Any]:
    if dtype == "int64":
        return array.copy()
    values = from_engine(array, dtype)
    return values.astype(np.float16) if wanted == "tensor(float16)" else values


def _uncast(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    return to_engine(array.astype(np.float32), dtype)


def open_graph(graph: str) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """An ``onnxruntime.InferenceSession`` that computes the graph exactly."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # By default, it multiplies dequantized weights with activations rounded to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def make_tensorrt(version: str = VERSION) -> ModuleType:
    """A module to put in the place of ``tensorrt_rtx``."""
    module: Any = ModuleType("tensorrt_rtx")
    module.__version__ = version
    for one in (
        ILogger,
        Runtime,
        ExecutionContextAllocationStrategy,
        DynamicShapesKernelSpecializationStrategy,
    ):
        setattr(module, one.__name__, one)
    made: ModuleType = module
    return made


# --- engines --------------------------------------------------------------------------------------


def write_engines(
    folder: Path,
    model: ir.Model,
    libcuda: Path,
    *,
    dtype: Literal["float16", "bfloat16"] = "float16",
    narrow: bool = False,
    capabilities: Sequence[str] = ("8.0", "8.6"),
    **ranges: Any,  # noqa: ANN401 - fields of the target's section of model.yaml
) -> EngineSet:
    """A target's folder as the build writes it, with engines of the stand-in.

    Args:
      folder: created; the graph becomes ``model.onnx`` in it. Its float32 twin, which is what the
        engines compute, becomes ``twin.onnx`` beside the artifact.
      model: as it was lowered.
      libcuda: the stand-in of the driver.
      dtype: of the engines.
      narrow: let cache and factors be of ``dtype``; otherwise they are float32, as in the twin.
      capabilities: to write an engine for.
      **ranges: of the profiles.
    """
    from eoracc.compiler.config.tensorrt import TensorRtRtxConfig
    from eoracc.compiler.targets.tensorrt.engines.bindings import bindings_of, profiles_for

    folder.mkdir(parents=True)
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    twin, computed = float32_twin(model), folder.parents[1] / "twin.onnx"
    ir.save(twin, computed, external_data="twin.onnx.data")
    bindings = bindings_of(model.graph if narrow else twin.graph)
    config = TensorRtRtxConfig(dtype=dtype, **ranges)
    profiles = profiles_for(config, bindings)
    content = {
        "graph": str(computed),
        "libcuda": str(libcuda),
        "profiles": [profile.dims for profile in profiles],
        "bindings": [vars(one) for one in bindings],
    }
    engines = []
    for capability in capabilities:
        file = folder / f"sm{capability.replace('.', '')}.engine"
        file.write_text(json.dumps(content))
        engines.append(EngineFile(capability, file.name, "0" * 64, file.stat().st_size))
    names = {one.name for one in bindings}
    adapters = any(name.endswith(".lora_a") for name in names)
    written = EngineSet(
        package="tensorrt_rtx",
        version=VERSION,
        graph="model.onnx",
        dtype=dtype,
        context_length=config.context_length,
        cache_layout="in_place" if "write_indices" in names else "concat",
        cache_layers=sum(name.startswith("past_key_values.") for name in names) // 2,
        adapter_type=dtype if adapters else "none",
        max_rank=config.rank[2] if adapters else 0,
        profiles=profiles,
        bindings=bindings,
        engines=tuple(engines),
    )
    (folder / ENGINES_FILE).write_text(written.to_json())
    return written
