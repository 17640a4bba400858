"""Measure an artifact: speed, start, memory, and the cost of adapters."""

from __future__ import annotations

from eoracc.runtime.bench.benchmark import BenchOptions, run_benchmark
from eoracc.runtime.bench.report import BenchReport

__all__ = ["BenchOptions", "BenchReport", "run_benchmark"]
