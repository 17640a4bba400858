from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.compiler.frontend_check.calls import (
    Call,
    calls_for,
    original_positions,
    window_of,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SMALL = {"block_parameters": 10**5, "cached_elements": 128}
_LARGE = {"block_parameters": 5 * 10**8, "cached_elements": 2048}


def _config(model_type: str = "llama", **fields: Any) -> PretrainedConfig:  # noqa: ANN401
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{"max_position_embeddings": 4096, **fields})


def _yarn(original: int) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": original,
    }


def _pasts(calls: list[Call]) -> list[int]:
    return [call.past for call in calls]


def test_a_plain_model_gets_a_prompt_and_a_batch() -> None:
    first, batch = calls_for(_config(), **_SMALL)
    assert (first.lengths, first.steps, first.past) == ((25,), (24, 1), 0)
    assert (batch.lengths, batch.steps, batch.past) == ((24, 6), (24,), 0)


def test_prompts_of_a_small_model_pass_the_window_and_the_original_positions() -> None:
    window = _config("mistral", sliding_window=100)
    assert calls_for(window, **_SMALL)[0].steps == (108, 1)
    original = _config(rope_parameters=_yarn(300))
    assert calls_for(original, **_SMALL)[0].steps == (308, 1)
    assert _pasts(calls_for(original, **_SMALL)) == [0, 0, 300]
    both = _config("mistral", sliding_window=100, rope_parameters=_yarn(300))
    assert _pasts(calls_for(both, **_SMALL)) == [0, 0, 100, 300]


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        (_LARGE, {}),  # too many products
        (_SMALL, {"vocab_size": 10**6}),  # too many logits
        (_SMALL, {"max_position_embeddings": 105}),  # too few positions
    ],
)
def test_other_prompts_stay_short_and_a_cache_passes_the_window(
    sizes: dict[str, int], fields: dict[str, int]
) -> None:
    calls = calls_for(_config("mistral", sliding_window=100, **fields), **sizes)
    assert calls[0].steps == (24, 1)
    assert _pasts(calls) == [0, 0, 100]


def test_no_call_goes_beyond_the_positions() -> None:
    for positions in (2, 9, 24, 25, 26, 103, 104, 4096):
        config = _config("mistral", sliding_window=100, max_position_embeddings=positions)
        for call in calls_for(config, **_SMALL):
            assert call.last_position < positions
            assert min(call.lengths) >= 1
            assert sum(call.steps) == max(call.lengths)


def test_a_cache_that_is_too_large_is_left_out() -> None:
    config = _config("mistral", sliding_window=1000)
    for elements, pasts in ((134_000, [0, 0, 1000]), (135_000, [0, 0])):
        calls = calls_for(config, block_parameters=10**9, cached_elements=elements)
        assert _pasts(calls) == pasts


def test_tokens_masks_and_caches() -> None:
    call = Call("batch", (3, 1), (3,), past=2)
    assert call.mask().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    tokens = call.tokens(50)
    assert tokens.shape == (2, 3)
    assert tokens.min() >= 0
    assert tokens.max() < 50
    np.testing.assert_array_equal(tokens, call.tokens(50))
    keys = call.cache("past_key_values.0.key", (4, 8))
    assert keys.shape == (2, 4, 2, 8)
    np.testing.assert_array_equal(keys, call.cache("past_key_values.0.key", (4, 8)))
    assert not np.array_equal(keys, call.cache("past_key_values.0.value", (4, 8)))


def test_fields_are_found_wherever_a_family_has_them() -> None:
    sections = {"full_attention": _yarn(64), "sliding_attention": {"rope_type": "default"}}
    nested = _config("gemma3_text", rope_parameters=sections)
    assert len(list(rope_sections(nested))) == 2
    assert original_positions(nested) == 64
    assert original_positions(_config("phi3", original_max_position_embeddings=128)) == 128
    assert original_positions(_config()) == 0
    assert window_of(_config("qwen2", use_sliding_window=False, sliding_window=9)) == 0
    assert window_of(_config("qwen2", use_sliding_window=True, sliding_window=9)) == 9
