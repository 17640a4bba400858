from __future__ import annotations

import numpy as np

from eoracc.compiler.report.texts import text_warnings
from eoracc.compiler.text.windows import Windows


def windows(ids: np.ndarray, *, padding: int = 0) -> Windows:
    mask = np.ones((1, len(ids)), np.int64)
    if padding:
        mask[:, -padding:] = 0
    return Windows(ids[None].astype(np.int64), mask)


def zipf(seed: int, count: int, first: int = 0) -> np.ndarray:
    """Tokens from ``first`` on, the rarer the later."""
    return first + np.random.default_rng(seed).zipf(1.3, count) % 50_000


def test_text_of_the_same_kind() -> None:
    for count in (500, 20_000):
        assert text_warnings(windows(zipf(0, count)), windows(zipf(1, 2000))) == []


def test_text_of_another_kind() -> None:
    held_out = np.concatenate([zipf(1, 1000), zipf(2, 1000, first=60_000)])
    (warning,) = text_warnings(windows(zipf(0, 20_000)), windows(held_out))
    assert (warning.code, warning.linear) == ("unlike_text", None)
    figures = warning.figures
    assert figures["held_out_tokens"] == 2000
    assert 0.5 < figures["unseen"] < 0.6  # the second half, and some of the first
    values, counts = np.unique(zipf(0, 20_000), return_counts=True)
    assert figures["expected_unseen"] == np.sum(counts == 1) / 20_000
    assert f"{figures['unseen']:.0%}" in warning.message
    del values


def test_padding_is_no_text() -> None:
    held_out = np.concatenate([zipf(1, 1000), np.full(1000, 70_000)])
    assert text_warnings(windows(zipf(0, 20_000)), windows(held_out, padding=1000)) == []


def test_without_calibration() -> None:
    assert text_warnings(None, windows(zipf(0, 100))) == []
