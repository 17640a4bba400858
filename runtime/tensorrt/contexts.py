"""Execution contexts of an engine, one for each profile, and calls through them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eoracc.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    from eoracc.runtime.tensorrt.cuda import Device
    from eoracc.runtime.tensorrt.engine_set import Binding, EngineSet, Profile
    from eoracc.runtime.tensorrt.library import Library

__all__ = ["Contexts"]


class Contexts:
    """Calls of one engine, in the order of a stream. Threads may share it.

    Calls are enqueued one at a time, because a context keeps shapes and addresses between calls.
    Parallel calls would not be faster, as one call occupies the GPU.
    """

    def __init__(self, library: Library, engine: Any, engines: EngineSet, device: Device) -> None:  # noqa: ANN401 - TensorRT has no types
        """Create a context for every profile; each takes the memory that its profile needs.

        Args:
          library: that deserialized the engine.
          engine: of TensorRT.
          engines: description of the engine.
          device: that the engine runs on.

        Raises:
          ArtifactError: engines.json describes another engine.
          BackendError: TensorRT fails.
        """
        self._library = library
        self._device = device
        self._engine = engine  # contexts need it alive
        self._engines = engines
        self._lock = threading.Lock()
        _check_bindings(engine, engines)
        self._contexts = [
            _Context(library, self._make_context(index), engines.bindings)
            for index in range(len(engines.profiles))
        ]

    def _make_context(self, index: int) -> Any:  # noqa: ANN401 - TensorRT has no types
        trt, engine = self._library.module, self._engine
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        specialization = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if specialization is None:
            context = engine.create_execution_context(strategy=strategy)
        else:
            # TensorRT for RTX compiles kernels for each new shape in the background. If the cache
            # grows by a token in each step, no kernel would be used twice.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self._engines.cache_layout == "concat":
                config.dynamic_shapes_kernel_specialization_strategy = specialization.NONE
            context = engine.create_execution_context(runtime_config=config)
        if context is None or not context.set_optimization_profile_async(
            index, self._device.stream
        ):
            raise BackendError(
                f"{trt.__name__} cannot create a context for the profile "
                f"'{self._engines.profiles[index].name}': {self._library.complaint}"
            )
        return context

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Ranges of the sizes of calls."""
        return self._engines.profiles

    def enqueue(self, dims: Mapping[str, int], addresses: Mapping[str, int]) -> None:
        """Start a call; it ends in the order of the device's stream.

        Args:
          dims: size of every dynamic dimension.
          addresses: of every input and output on the device.

        Raises:
          BackendError: the call fits no profile, or TensorRT rejects it.
        """
        # Of several profiles that fit, the one for the fewest tokens.
        fitting = [
            (profile.dims["sequence"][2], index)
            for index, profile in enumerate(self.profiles)
            if profile.takes(dims)
        ]
        if not fitting:
            raise BackendError(_outside(dims, self.profiles))
        with self._lock:
            self._contexts[min(fitting)[1]].enqueue(dims, addresses, self._device.stream)


class _Context:
    """One context; only shapes and addresses that have changed are set."""

    def __init__(self, library: Library, context: Any, bindings: tuple[Binding, ...]) -> None:  # noqa: ANN401 - no types
        self._library = library
        self._context = context
        self._inputs = [binding for binding in bindings if binding.mode == "input"]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def enqueue(self, dims: Mapping[str, int], addresses: Mapping[str, int], stream: int) -> None:
        try:
            for binding in self._inputs:
                name, shape = binding.name, binding.resolve(dims)
                if self._shapes.get(name) != shape:
                    self._shapes.pop(name, None)
                    self._check(self._context.set_input_shape(name, shape), name)
                    self._shapes[name] = shape
            for name, address in addresses.items():
                if self._addresses.get(name) != address:
                    self._addresses.pop(name, None)
                    self._check(self._context.set_tensor_address(name, address), name)
                    self._addresses[name] = address
            self._check(self._context.execute_async_v3(stream), "the call")
        except (RuntimeError, TypeError, ValueError) as error:
            raise self._failure(str(error)) from error

    def _check(self, accepted: bool, subject: str) -> None:
        if not accepted:
            raise self._failure(f"it refuses {subject}")

    def _failure(self, reason: str) -> BackendError:
        return BackendError(
            f"{self._library.module.__name__} fails: {reason}: {self._library.complaint}"
        )


def _check_bindings(engine: Any, engines: EngineSet) -> None:  # noqa: ANN401 - TensorRT has no types
    """Check that the engine has the listed inputs, outputs and number of profiles."""
    held = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    listed = {binding.name for binding in engines.bindings}
    if held != listed or engine.num_optimization_profiles != len(engines.profiles):
        odd = ", ".join(sorted(held ^ listed)[:3]) or "their profiles differ"
        raise ArtifactError(
            f"engines.json does not describe the engine beside it ({odd}): build it again"
        )


def _outside(dims: Mapping[str, int], profiles: tuple[Profile, ...]) -> str:
    """Error text of a call that fits no profile, with the ranges of the closest one."""

    def misfits(profile: Profile) -> list[str]:
        return [
            f"{name} {dims[name]} (built for {low} to {high})"
            for name, (low, _, high) in profile.dims.items()
            if not low <= dims[name] <= high
        ]

    nearest = min(map(misfits, profiles), key=len, default=["anything: it has no profile"])
    return f"the engine does not take a call of {', '.join(nearest)}: build it for wider ranges"
