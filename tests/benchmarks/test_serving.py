from __future__ import annotations

import pytest

from benchmarks.serving import Answer, line_of, prompt_of, summarize


def test_figures_of_answers() -> None:
    answers = [
        Answer(begin=1.0, tokens=(1.5, 2.0, 2.5), made=3),
        Answer(begin=2.0, tokens=(4.0, 5.0, 6.0), made=5),  # two events held several tokens
    ]
    found = summarize("ours", 2, answers)
    assert found.tokens_per_s == pytest.approx(8 / 5)
    assert found.requests_per_s == pytest.approx(2 / 5)
    assert found.first_token_s["p50"] == pytest.approx((0.5 + 2.0) / 2)
    assert found.per_token_s["p99"] == pytest.approx(0.5)
    assert found.request_s["p50"] == pytest.approx((1.5 + 4.0) / 2)
    assert line_of(found).split()[:4] == ["ours", "2", "1.6", "0.40"]


def test_prompts_differ() -> None:
    prompts = {prompt_of(number, 20) for number in range(50)}
    assert len(prompts) == 50
    assert {len(prompt.split()) for prompt in prompts} == {20}
    assert prompt_of(3, 20) in prompts
