"""Skipped tests in one line: how many, and for what reasons."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pytest

__all__ = ["reason_of", "summarize"]

PROCESSOR = re.compile(r"(this processor has no) (\w+)")


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The reason that a test gave when it skipped itself, or a module its tests."""
    problem = report.longrepr
    text = problem[2] if isinstance(problem, tuple) else str(problem)
    return text.removeprefix("Skipped: ")


def summarize(reasons: Iterable[str]) -> str:
    """One line for the reasons of all skips; those of the processor are one reason.

    >>> no = "this processor has no"
    >>> summarize([f"{no} amx", f"{no} vnni", f"{no} amx", "triton is not installed"])
    '4 skipped: 3 this processor has no amx/vnni, 1 triton is not installed'
    """
    counts: Counter[str] = Counter()
    missing: defaultdict[str, set[str]] = defaultdict(set)
    for reason in reasons:
        match = PROCESSOR.fullmatch(reason)
        kind, feature = match.groups() if match else (reason, "")
        counts[kind] += 1
        missing[kind].add(feature)
    parts = [
        f"{count} {kind} {'/'.join(sorted(missing[kind]))}".rstrip()
        for kind, count in counts.most_common()
    ]
    return f"{counts.total()} skipped: {', '.join(parts)}"
