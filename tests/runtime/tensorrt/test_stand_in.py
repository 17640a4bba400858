"""The stand-in has the interface of the real package, so that it cannot drift away from it."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from tests.optional import require
from tests.runtime.tensorrt import stand_in

require("tensorrt_rtx")
trt: Any = importlib.import_module("tensorrt_rtx")

CLASSES = ("ILogger", "Runtime", "IRuntimeConfig", "ICudaEngine", "IExecutionContext")


def methods(kind: type) -> dict[str, list[str]]:
    """Names of the parameters of each public method of a class of the stand-in."""
    return {
        name: list(inspect.signature(member).parameters)[1:]
        for name, member in vars(kind).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def properties(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if isinstance(member, property)]


def real_parameters(method: Any) -> list[list[str]]:  # noqa: ANN401 - of pybind11
    """Names of the parameters of each overload, which pybind11 puts into the docstring."""
    signatures = re.findall(rf"{method.__name__}\(self: [^,)]+(?:, (.*?))?\) ->", method.__doc__)
    return [re.findall(r"(?:^|, )(\w+): ", signature) for signature in signatures]


@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_their_parameters_are_those_of_tensorrt(name: str) -> None:
    ours, real = getattr(stand_in, name), getattr(trt, name)
    found = methods(ours)
    for method, parameters in found.items():
        overloads = real_parameters(getattr(real, method))
        assert parameters in overloads, (method, overloads)
    for attribute in properties(ours):
        assert isinstance(getattr(real, attribute), property), attribute
    assert found


def test_what_is_read_off_instances() -> None:
    config = stand_in.IRuntimeConfig()
    strategy = "dynamic_shapes_kernel_specialization_strategy"
    assert hasattr(config, strategy)
    assert getattr(trt.IRuntimeConfig, strategy).fset is not None


@pytest.mark.parametrize(
    "name",
    ["ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy"],
)
def test_enumerations(name: str) -> None:
    ours, real = getattr(stand_in, name), getattr(trt, name)
    for member in ours:
        assert int(getattr(real, member.name)) == member.value


def test_severities_compare_as_they_do_in_tensorrt() -> None:
    ours, real = stand_in.ILogger.Severity, trt.ILogger.Severity
    for one in ours:
        for other in ours:
            assert (getattr(real, one.name) <= getattr(real, other.name)) == (one <= other)


def test_module_has_what_the_runtime_takes_from_it() -> None:
    module = stand_in.make_tensorrt()
    names = [name for name in vars(module) if not name.startswith("__")]
    assert names
    assert all(hasattr(trt, name) for name in names)
    assert isinstance(trt.__version__, str)
