"""Errors that passes record, of weights of many rows."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from eoracc.passes.compensate.base import RankOverride
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.quantize import row_blocks
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.gram import Gram
from eoracc.passes.statistics import record_error
from tests.passes.groups import correlated, make_group

ROWS, WIDTH = 4_000, 64


def head_and_gram(*, matched: bool) -> tuple[np.ndarray, Gram]:
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
    gram = make_group({"lm_head": weight}, correlated(rng, 300, WIDTH)).gram
    assert gram is not None
    matching = 0.1 * rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    return weight, replace(gram, matching=matching if matched else None)


@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_the_error_of_a_head_is_that_of_all_its_rows(
    rank: int, matched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_WEIGHTS", 301 * WIDTH)
    weight, gram = head_and_gram(matched=matched)
    group = make_group({"lm_head": weight})
    group.gram = gram
    (head,) = group.linears
    QuantizeRtn(embedding_bits=3).call(group)
    if rank:
        Svd(rank=rank, overrides={"lm_head": RankOverride()}).call(group)
    record_error("last", head, gram)
    target = weight.astype(np.float64)
    if gram.matching is not None:
        target = target + target @ gram.matching
    lost = target - head.effective_weight()
    h = gram.matrix.astype(np.float64)
    expected = np.sqrt(np.sum((lost @ h) * lost) / np.sum((target @ h) * target))
    assert head.record.errors["last"] == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_head_takes_no_arrays_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_BLOCK_WEIGHTS", 100 * WIDTH)
    weight, gram = head_and_gram(matched=True)
    group = make_group({"lm_head": weight})
    group.gram = gram
    QuantizeRtn(embedding_bits=3).call(group)
    assert gram.root is not None  # it is computed once
    assert not gram.lost
    tracemalloc.start()
    try:
        record_error("last", group.linears[0], gram)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The weight itself, and five arrays of a block of 100 rows.
    assert peak < 1.3 * weight.nbytes
