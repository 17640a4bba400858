from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from eoracc.passes.compensate.eora import Eora
from eoracc.passes.compensate.svd import Svd
from eoracc.passes.graph.linears import LinearGroup
from eoracc.passes.quantize.quantization import EMBEDDING_BITS
from eoracc.passes.quantize.quantize_gptq import QuantizeGptq
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from tests.passes.groups import make_group

Q, K, DOWN = (f"model.layers.{n}" for n in ("0.self_attn.q_proj", "0.self_attn.k_proj", "11.down"))


def gptq(**options: object) -> QuantizeGptq:
    """A pass that leaves the head alone, unless ``options`` say otherwise."""
    return TypeAdapter(QuantizeGptq).validate_python({"embedding_bits": None} | options)


@pytest.fixture
def group() -> LinearGroup:
    return make_group({name: np.ones((16, 16), np.float32) for name in (Q, K, DOWN, "lm_head")})


def chosen(quantize: QuantizeGptq, group: LinearGroup) -> dict[str, int]:
    return {
        linear.name: options.bits
        for options, linears in quantize.partition(group)
        for linear in linears
    }


def test_the_head_is_left_alone_unless_a_pattern_names_it(group: LinearGroup) -> None:
    assert chosen(gptq(bits=3), group) == {Q: 3, K: 3, DOWN: 3}
    assert chosen(gptq(bits=3, overrides={"*": {"bits": 4}}), group) == {Q: 4, K: 4, DOWN: 4}
    for pattern in ("lm_head", "lm_*", "*head"):
        assert chosen(gptq(bits=3, overrides={pattern: {"bits": 8}}), group)["lm_head"] == 8


def test_the_head_has_a_width_of_its_own(group: LinearGroup) -> None:
    default = chosen(QuantizeGptq(bits=3), group)
    assert default == {Q: 3, K: 3, DOWN: 3, "lm_head": EMBEDDING_BITS}
    bare = gptq(bits=3, embedding_bits=4, overrides={"*": {"bits": 2}})
    assert chosen(bare, group) == {Q: 2, K: 2, DOWN: 2, "lm_head": 4}
    named = gptq(bits=3, embedding_bits=4, overrides={"lm_head": {"bits": 8}})
    assert chosen(named, group) == {Q: 3, K: 3, DOWN: 3, "lm_head": 8}
    skipped = gptq(bits=3, embedding_bits=4, overrides={"lm_head": {"skip": True}})
    assert chosen(skipped, group) == {Q: 3, K: 3, DOWN: 3}
    for overrides, size in (({}, 64), ({"lm_head": {"bits": 8}}, 64)):
        options = gptq(
            group_size=32, embedding_bits=4, embedding_group_size=64, overrides=overrides
        ).options_for(group.linears[-1])
        assert options is not None
        assert options.group_size == size


def test_the_last_match_wins_whole(group: LinearGroup) -> None:
    overrides = {"*_proj": {"bits": 4, "group_size": 32}, "*.k_proj": {"bits": 8}}
    quantize = gptq(bits=3, group_size=64, overrides=overrides)
    assert chosen(quantize, group) == {Q: 4, K: 8, DOWN: 3}
    k = quantize.options_for(group.linears[1])
    assert k is not None
    assert k.group_size == 64


def test_skipping_and_taking_back(group: LinearGroup) -> None:
    overrides = {"model.layers.0.*": {"skip": True}, "*.k_proj": {}}
    assert chosen(gptq(bits=3, overrides=overrides), group) == {K: 3, DOWN: 3}


def test_members_with_the_same_options_stay_together(group: LinearGroup) -> None:
    quantize = gptq(bits=3, overrides={"*.k_proj": {"bits": 4}, "*.down": {"bits": 3}})
    sizes = [len(linears) for _, linears in quantize.partition(group)]
    assert sizes == [2, 1]


def test_patterns_that_match_nothing_are_named() -> None:
    quantize = gptq(overrides={"*.q_proj": {"bits": 4}, "*.dwon_proj": {"bits": 4}})
    assert quantize.unmatched_overrides(iter([Q, K])) == ("*.dwon_proj",)


@pytest.mark.parametrize("kind", [QuantizeGptq, QuantizeRtn, Eora, Svd])
def test_unknown_options_are_refused(kind: type) -> None:
    adapter: TypeAdapter[object] = TypeAdapter(kind)
    with pytest.raises(ValidationError, match="bitz"):
        adapter.validate_python({"bitz": 3})
    with pytest.raises(ValidationError, match="bitz"):
        adapter.validate_python({"overrides": {"*.q_proj": {"bitz": 3}}})


@pytest.mark.parametrize("size", [0, -2, 8, 20, 264, True, 64.5, "64", "Auto"])
def test_group_sizes_that_cannot_be_are_refused(size: object) -> None:
    with pytest.raises(ValidationError, match=f"{size!r} is no group size: give a multiple of 8"):
        gptq(group_size=size)
    with pytest.raises(ValidationError, match="is no group size"):
        gptq(overrides={"*.q_proj": {"group_size": size}})


@pytest.mark.parametrize("option", [{"bits": 5}, {"damping": -0.1}, {"damping": 2.0}])
def test_values_out_of_range_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(option))):
        gptq(**option)


def test_what_a_survey_has_planned_holds_unless_a_pattern_says_otherwise(
    group: LinearGroup,
) -> None:
    for linear in group.linears:
        # Options of other passes are none of this one's business.
        linear.plan = {"bits": 2, "group_size": 32, "ratio": 0.5}
    quantize = gptq(bits=3, overrides={"*.k_proj": {"bits": 4}, "*.down": {"skip": True}})
    q, k, down, head = map(quantize.options_for, group.linears)
    assert q is not None
    assert k is not None
    assert (q.bits, q.group_size) == (2, 32)
    assert (k.bits, k.group_size) == (4, 32)
    assert down is head is None


def test_a_pattern_that_names_a_factorised_weight_holds_for_both_factors() -> None:
    whole = make_group({Q: np.ones((16, 16), np.float32)})
    factors = make_group({f"{Q}.{part}": np.ones((16, 16), np.float32) for part in ("v", "u")})
    for linear in factors.linears:
        linear.whole = whole.linears[0]
    names = [name for linear in factors.linears for name in linear.known_as]
    quantize = gptq(bits=3, overrides={"*.q_proj": {"bits": 4}, "*.u": {"bits": 8}})
    assert chosen(quantize, factors) == {f"{Q}.v": 4, f"{Q}.u": 8}
    assert quantize.unmatched_overrides(names) == ()
