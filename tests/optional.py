"""Packages that only `make setup-gpu` installs, and the tests that need them."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

__all__ = ["REQUIRE_ALL", "require"]

REQUIRE_ALL = "EORACC_REQUIRE_GPU_PACKAGES"


def require(package: str) -> None:
    """Skip the test (or, called at the top of a module, its tests) unless ``package`` is installed.

    `make test` installs every package and sets ``EORACC_REQUIRE_GPU_PACKAGES=1``: a package that is
    missing is an error there, so that no test is skipped unseen. The package is not imported.

    Args:
      package: name by which it is imported: triton, tensorrt_rtx or tensorrt_bindings.
    """
    __tracebackhide__ = True  # the caller is the place of the skip
    if find_spec(package) is not None:
        return
    problem = f"{package} is not installed: make setup-gpu"
    if os.environ.get(REQUIRE_ALL) == "1":
        raise ModuleNotFoundError(problem, name=package)
    pytest.skip(problem, allow_module_level=True)
