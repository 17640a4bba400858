"""What holds for every pass that stores weights in fewer bytes, and for every quantizing one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from eoracc.errors import PassError
from eoracc.passes import load_passes
from eoracc.passes.base import passes_of
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.compression import Compression
from eoracc.passes.imported import Imported
from eoracc.passes.overrides import Override
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.quantize.quantization import (
    EMBEDDING_BITS,
    Quantization,
    QuantizeOverride,
)
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factors import weighted_norm
from tests.passes.groups import make_group, qkv

load_passes()

# Those that solve for weights; 'imported' takes over a checkpoint's.
METHODS = tuple(kind for kind in passes_of(Compression) if kind is not Imported)
QUANTIZATIONS = passes_of(Quantization)


@pytest.mark.parametrize("method", METHODS)
def test_puts_the_error_of_what_it_stores_on_record(method: type[Compression]) -> None:
    group = qkv()
    compress = method()
    compress.requires(group)
    compress.call(group)
    assert group.gram is not None
    for linear in group.linears:
        assert linear.compressed is not None
        assert linear.quantizer == compress
        weight, gram = linear.weight(), group.gram.matrix
        left = weighted_norm(weight - linear.compressed.dequantize(), gram)
        assert 0 < linear.record.errors[method.name] < 1
        np.testing.assert_allclose(
            linear.record.errors[method.name], left / weighted_norm(weight, gram), rtol=1e-4
        )


@pytest.mark.parametrize("method", METHODS)
def test_plans_the_bytes_that_it_stores(method: type[Compression]) -> None:
    group = qkv()
    compress = method()
    compress.call(group)
    for linear in group.linears:
        assert linear.compressed is not None
        planned = compress.code_bytes(linear.out_features, linear.in_features)
        assert planned == linear.compressed.nbytes


@pytest.mark.parametrize("method", METHODS)
def test_requantizes_as_it_compressed(method: type[Compression]) -> None:
    group = qkv()
    method().call(group)
    for linear in group.linears:
        assert linear.compressed is not None
        again = method().requantize(linear.weight(), group.gram)
        # GPTQ solves the group as one stack: sums of other lengths round differently.
        np.testing.assert_allclose(
            again.dequantize(), linear.compressed.dequantize(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("method", METHODS)
def test_compresses_a_table_that_has_no_gram(method: type[Compression]) -> None:
    weight = np.random.default_rng(2).standard_normal((24, 64)).astype(np.float32)
    stored = method().requantize(weight, None)
    assert (stored.out_features, stored.in_features) == weight.shape
    assert 0 < np.linalg.norm(weight - stored.dequantize()) < np.linalg.norm(weight)


@pytest.mark.parametrize("method", METHODS)
def test_leaves_out_what_an_override_skips(method: type[Compression]) -> None:
    group = qkv()
    skip = QuantizeOverride if issubclass(method, Quantization) else Override
    method(overrides={"*.k_proj": skip(skip=True)}).call(group)
    q, k = group.linears
    assert q.compressed is not None
    assert k.compressed is None
    assert k.record.errors == {method.name: 0.0}
    Svd(rank=2).call(group)
    assert q.factors is not None
    assert k.factors is None


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_compresses_the_weights(method: type[Compression]) -> None:
    for other in METHODS:
        problems = [text for _, text in Recipe([other(), method()]).problems()]
        if issubclass(other, Pruning) and issubclass(method, Quantization):
            assert not any(other.name in text for text in problems)
            continue
        expected = "occurs twice" if other is method else f"compressed already by '{other.name}'"
        if issubclass(method, Pruning) and issubclass(other, Quantization):
            expected = f"must come before '{other.name}'"
        assert any(expected in text for text in problems)


@pytest.mark.parametrize("method", METHODS)
def test_none_of_them_stands_beside_an_imported_checkpoint(method: type[Compression]) -> None:
    for passes in ([method(), Imported()], [Imported(), method()]):
        problems = [text for _, text in Recipe(passes).problems()]
        assert any("keep one of the two" in text for text in problems)


@pytest.mark.parametrize("method", QUANTIZATIONS)
@pytest.mark.parametrize("group_size", [16, 32, -1, "auto"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bytes_follow_the_options(
    method: type[Quantization], group_size: int | Literal["auto"], symmetric: bool
) -> None:
    compress = method(bits=3, group_size=group_size, symmetric=symmetric)
    group = qkv()
    compress.call(group)
    for linear in group.linears:
        assert linear.quantized is not None
        assert linear.quantized.bits == 3
        assert (linear.quantized.zero_points is None) == symmetric
        planned = compress.code_bytes(linear.out_features, linear.in_features)
        assert planned == linear.quantized.nbytes


@pytest.mark.parametrize("method", QUANTIZATIONS)
def test_the_head_takes_a_width_of_its_own(method: type[Quantization]) -> None:
    inputs = np.random.default_rng(4).standard_normal((64, 16)).astype(np.float32)

    def width(quantize: Quantization) -> int | None:
        group = make_group({"lm_head": np.eye(16, dtype=np.float32)}, inputs)
        quantize.call(group)
        weight = group.linears[0].quantized
        return None if weight is None else weight.bits

    named = {"lm_head": QuantizeOverride(bits=2)}
    assert width(method()) == EMBEDDING_BITS
    assert width(method(embedding_bits=3)) == 3
    assert width(method(overrides=named)) == 2
    assert width(method(embedding_bits=None)) is None
    assert width(method(embedding_bits=None, overrides=named)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_factorised_linear_is_refused_within_its_sweep(method: type[Compression]) -> None:
    group = qkv()
    rng = np.random.default_rng(5)
    for linear in group.linears:
        linear.factorize(
            rng.standard_normal((linear.out_features, 4)).astype(np.float32),
            rng.standard_normal((4, linear.in_features)).astype(np.float32),
        )
    with pytest.raises(PassError, match="has been factorised in this sweep"):
        method().call(group)


@pytest.mark.parametrize("method", QUANTIZATIONS)
@pytest.mark.parametrize("power", [-24, -40, 18])
def test_a_weight_beyond_float16_scales_is_quantized_like_a_larger_one(
    method: type[Quantization], power: int
) -> None:
    group = qkv()
    assert group.gram is not None
    small = make_group(
        {
            linear.name: np.ldexp(linear.weight(), power if linear.role == "k_proj" else 0)
            for linear in group.linears
        }
    )
    small.gram = group.gram
    method(bits=3, group_size=24).call(group)
    method(bits=3, group_size=24).call(small)
    for ordinary, found in zip(group.linears, small.linears, strict=True):
        assert ordinary.quantized is not None
        assert found.quantized is not None
        is_small = found.role == "k_proj"
        assert ordinary.quantized.scales.dtype == np.float16
        assert found.quantized.scales.dtype == (np.float32 if is_small else np.float16)
        np.testing.assert_array_equal(
            found.quantized.dequantize(),
            np.ldexp(ordinary.quantized.dequantize(), power if is_small else 0),
        )
        assert ["scales are float32" in note for note in found.record.notes] == [True] * is_small
        assert found.record.errors[method.name] == pytest.approx(
            ordinary.record.errors[method.name], rel=1e-4
        )
        again = method(bits=3, group_size=24).requantize(found.weight(), None)
        assert again.scales.dtype == found.quantized.scales.dtype
