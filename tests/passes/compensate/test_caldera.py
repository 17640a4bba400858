from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.errors import PassError
from eoracc.passes.compensate.base import RankOverride
from eoracc.passes.compensate.caldera import Caldera
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.factors import top_of_gram, weighted_norm
from tests.passes.groups import qkv

RANK = 6


def quantized(quantizer: QuantizeGptq | QuantizeRtn, *, tokens: int = 400) -> LinearGroup:
    group = qkv(tokens=tokens)
    quantizer.call(group)
    return group


@pytest.mark.parametrize("quantizer", [QuantizeGptq(bits=2), QuantizeRtn(bits=2, symmetric=True)])
@pytest.mark.parametrize("factor_type", ["float16", "int4"])
def test_is_never_worse_than_eora_and_says_what_it_leaves(
    quantizer: QuantizeGptq | QuantizeRtn, factor_type: FactorType
) -> None:
    eora, caldera = quantized(quantizer), quantized(quantizer)
    Eora(rank=RANK, factor_type=factor_type).call(eora)
    pass_ = Caldera(rank=RANK, factor_type=factor_type)
    pass_.requires(caldera)
    pass_.call(caldera)
    gained = []
    for before, after in zip(eora.linears, caldera.linears, strict=True):
        assert before.quantized is not None
        assert after.quantized is not None
        assert before.factors is not None
        assert after.factors is not None
        assert after.record.errors["caldera"] <= before.record.errors["eora"]
        gained.append(after.record.errors["caldera"] < 0.99 * before.record.errors["eora"])
        # What is stored takes the same bytes, on the same kind of grid.
        assert after.quantized.nbytes == before.quantized.nbytes
        assert after.factors.nbytes == before.factors.nbytes
        assert (after.quantized.zero_points is None) == quantizer.symmetric
        assert caldera.gram is not None
        matrix, weight = caldera.gram.matrix, after.weight()
        left = weighted_norm(weight - after.effective_weight(), matrix)
        np.testing.assert_allclose(
            after.record.errors["caldera"], left / weighted_norm(weight, matrix), rtol=1e-4
        )
    if isinstance(quantizer, QuantizeGptq) and factor_type == "float16":
        assert any(gained)


def test_no_iterations_are_eora() -> None:
    eora, caldera = quantized(QuantizeGptq(bits=2)), quantized(QuantizeGptq(bits=2))
    Eora(rank=RANK).call(eora)
    Caldera(rank=RANK, iterations=0).call(caldera)
    for one, other in zip(eora.linears, caldera.linears, strict=True):
        np.testing.assert_array_equal(one.effective_weight(), other.effective_weight())


def test_the_options_of_the_quantizing_pass_hold_for_each_linear() -> None:
    quantizer = QuantizeGptq(
        bits=2,
        group_size=24,
        overrides={"*.k_proj": QuantizeOverride(bits=3, symmetric=True)},
    )
    group = quantized(quantizer)
    Caldera(rank=RANK, overrides={"*.q_proj": RankOverride(rank=3)}).call(group)
    q, k = (linear.quantized for linear in group.linears)
    assert q is not None
    assert k is not None
    assert (q.bits, k.bits) == (2, 3)
    assert q.zero_points is not None
    assert k.zero_points is None
    assert [linear.factors.rank for linear in group.linears if linear.factors] == [3, RANK]


def test_outputs_that_count_for_more_are_what_is_alternated_for() -> None:
    """With a G of a few outputs the best iterate is the best by that G."""
    eora, caldera = quantized(QuantizeGptq(bits=2)), quantized(QuantizeGptq(bits=2))
    grams = []
    for group in (eora, caldera):
        for linear in group.linears:
            counts = np.geomspace(1, 1e-4, linear.out_features)
            grams.append(np.diag(counts).astype(np.float32))
            linear.output_gram = lambda gram=grams[-1]: gram
    Eora(rank=RANK, factor_type="float16").call(eora)
    Caldera(rank=RANK, factor_type="float16").call(caldera)
    for before, after, outputs in zip(eora.linears, caldera.linears, grams, strict=False):
        assert caldera.gram is not None
        matrix, root = caldera.gram.matrix, np.sqrt(np.diagonal(outputs))[:, None]
        left, most = (
            weighted_norm(root * (one.weight() - one.effective_weight()), matrix)
            for one in (after, before)
        )
        assert left < 0.99 * most


def test_metrics_are_made_once_for_all_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    group = quantized(QuantizeGptq(bits=2))
    reads: list[str] = []
    for linear in group.linears:

        def read(linear: Linear = linear) -> NDArray[np.float32]:
            reads.append(linear.name)
            return np.eye(linear.out_features, dtype=np.float32)

        linear.output_gram = read
    tops: list[int] = []

    def counted(matrix: NDArray[np.float64], directions: int) -> NDArray[np.float64]:
        tops.append(directions)
        return top_of_gram(matrix, directions)

    monkeypatch.setattr("eoracc.passes.solvers.gram.top_of_gram", counted)
    Caldera(rank=RANK, directions=5, factor_type="int4", iterations=3).call(group)
    assert reads == [linear.name for linear in group.linears]
    assert tops == [5]


def test_few_tokens_are_left_to_eora() -> None:
    group = quantized(QuantizeGptq(bits=2), tokens=20)
    codes = [linear.quantized for linear in group.linears]
    Caldera(rank=RANK).call(group)
    assert [linear.quantized for linear in group.linears] == codes
    assert all(linear.factors is not None for linear in group.linears)


def test_factors_of_another_pass_are_in_the_way() -> None:
    group = quantized(QuantizeGptq(bits=2))
    Svd(rank=2).call(group)
    with pytest.raises(PassError, match=r"q_proj: has factors already.*take the compensating pass"):
        Caldera().requires(group)
