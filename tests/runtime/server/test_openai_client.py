"""The official client against a server in another process, compared with the model itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eoracc.runtime import Model, load
from tests.runtime.server.child import KEY, ServerProcess

if TYPE_CHECKING:
    import openai

PROMPT = "a state of the union"
MESSAGES = [{"role": "user", "content": PROMPT}]
BACKBONE = "artifact"


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    import openai

    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def model(adapted_artifact: Path) -> Model:
    return load(adapted_artifact, threads=1)


def test_lists_backbone_and_adapters(client: openai.OpenAI) -> None:
    import openai

    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == [BACKBONE, "math", "prose"]
    assert client.models.retrieve("math") == cards["math"]
    with pytest.raises(openai.NotFoundError, match="ask for one of 'artifact', 'math', 'prose'"):
        client.models.retrieve("poetry")


@pytest.mark.parametrize("name", [BACKBONE, "math", "prose"])
def test_completion_is_what_the_model_says(client: openai.OpenAI, model: Model, name: str) -> None:
    adapter = None if name == BACKBONE else name
    expected = model.generate(PROMPT, 24, adapter=adapter)
    response = client.completions.create(model=name, prompt=PROMPT, max_tokens=24, temperature=0)
    assert response.choices[0].text == expected.text
    assert response.choices[0].finish_reason == expected.finish_reason
    assert response.usage is not None
    assert response.usage.prompt_tokens == expected.prompt_tokens == len(PROMPT)
    assert response.usage.completion_tokens == len(expected.tokens)
    assert response.model == name
    others = {None, "math", "prose"} - {adapter}
    assert all(model.generate(PROMPT, 24, adapter=other).text != expected.text for other in others)


def test_weighted_sum_of_adapters(client: openai.OpenAI, model: Model) -> None:
    weights = {"math": 0.75, "prose": -0.5}
    expected = model.generate(PROMPT, 24, adapter=weights)
    response = client.completions.create(
        model=BACKBONE,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        extra_body={"adapters": weights},
    )
    assert response.choices[0].text == expected.text
    assert expected.text != model.generate(PROMPT, 24).text


def test_streamed_completion_adds_up_to_the_whole(client: openai.OpenAI, model: Model) -> None:
    expected = model.generate(PROMPT, 24, adapter="math")
    parts = list(
        client.completions.create(
            model="math",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == expected.text
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == expected.finish_reason
    usage = parts[-1].usage
    assert usage is not None
    assert usage.total_tokens == len(PROMPT) + len(expected.tokens)


def test_chat(client: openai.OpenAI, model: Model) -> None:
    expected = model.generate(MESSAGES, 24)
    response = client.chat.completions.create(
        model=BACKBONE,
        messages=[{"role": "user", "content": PROMPT}],
        max_completion_tokens=24,
        temperature=0,
    )
    assert response.object == "chat.completion"
    assert response.choices[0].message.role == "assistant"
    assert response.choices[0].message.content == expected.text
    assert response.usage is not None
    assert response.usage.prompt_tokens == expected.prompt_tokens > len(PROMPT)


def test_streamed_chat(client: openai.OpenAI, model: Model) -> None:
    expected = model.generate(MESSAGES, 24, adapter="prose")
    parts = list(
        client.chat.completions.create(
            model="prose",
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
    assert parts[-1].choices[0].finish_reason == expected.finish_reason
    assert all(part.object == "chat.completion.chunk" for part in parts)


def test_logprobs_are_the_model_s(client: openai.OpenAI, model: Model) -> None:
    expected = model.generate(PROMPT, 8, logprobs=3).logprobs
    assert expected is not None
    legacy = client.completions.create(
        model=BACKBONE, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3
    )
    listed = legacy.choices[0].logprobs
    assert listed is not None
    assert listed.token_logprobs == pytest.approx([token.logprob for token in expected], abs=1e-4)
    assert listed.top_logprobs is not None
    for ours, theirs in zip(expected, listed.top_logprobs, strict=True):
        assert sorted(theirs.values()) == pytest.approx(sorted(v for _, v in ours.top), abs=1e-4)
        assert math.isclose(max(theirs.values()), ours.logprob, abs_tol=1e-4)  # greedy

    chat = client.chat.completions.create(
        model=BACKBONE,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    text = b"".join(bytes(token.bytes or ()) for token in content.content)
    said = chat.choices[0].message.content
    assert said is not None
    assert text.decode(errors="replace") == said
    for token in content.content:
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 2


def test_sampling_repeats_with_its_seed(client: openai.OpenAI, model: Model) -> None:
    def sample(seed: int, n: int = 1) -> list[str]:
        response = client.completions.create(
            model="math", prompt=PROMPT, max_tokens=16, temperature=1.2, top_p=0.95, seed=seed, n=n
        )
        return [choice.text for choice in response.choices]

    first, second = sample(7, n=2)
    assert first != second
    assert sample(7) == [first]
    assert sample(8) == [second]  # choices count their seeds up
    own = model.generate(PROMPT, 16, adapter="math", temperature=1.2, top_p=0.95, seed=7)
    assert own.text == first


def test_stop_ends_the_text(client: openai.OpenAI, model: Model) -> None:
    whole = model.generate(PROMPT, 24, adapter="prose").text
    stop = whole[5:7]
    before = whole[: whole.index(stop)]
    assert len(stop) == 2
    assert before
    response = client.completions.create(
        model="prose", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop]
    )
    assert response.choices[0].text == before
    assert response.choices[0].finish_reason == "stop"
    parts = client.completions.create(
        model="prose", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True
    )
    assert "".join(part.choices[0].text for part in parts) == before


def test_rules_are_those_of_the_model(client: openai.OpenAI, model: Model) -> None:
    free = model.generate(PROMPT, 24)
    stop = free.tokens[7]
    expected = model.generate(
        PROMPT,
        24,
        stop_token_ids=[stop],
        min_new_tokens=9,
        repetition_penalty=1.2,
        presence_penalty=0.25,
        logit_bias={free.tokens[0]: -5.0},
        bad_words=["a", "b"],
    )
    response = client.completions.create(
        model=BACKBONE,
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        presence_penalty=0.25,
        logit_bias={str(free.tokens[0]): -5},
        extra_body={
            "stop_token_ids": [stop],
            "min_tokens": 9,
            "repetition_penalty": 1.2,
            "bad_words": ["a", "b"],
        },
    )
    assert response.choices[0].text == expected.text != free.text
    assert response.choices[0].finish_reason == expected.finish_reason
    assert response.usage is not None
    assert response.usage.completion_tokens == len(expected.tokens)


def test_a_request_that_bans_every_token(client: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="every token is banned"):
        client.completions.create(
            model=BACKBONE,
            prompt="a",
            extra_body={"stop_token_ids": list(range(260)), "min_tokens": 1},
        )


def test_echo_and_several_prompts(client: openai.OpenAI, model: Model) -> None:
    response = client.completions.create(
        model=BACKBONE, prompt=["abc", "b"], max_tokens=4, temperature=0, echo=True
    )
    assert [choice.text for choice in response.choices] == [
        prompt + model.generate(prompt, 4).text for prompt in ("abc", "b")
    ]
    nothing = client.completions.create(model=BACKBONE, prompt="abc", max_tokens=0, echo=True)
    assert nothing.choices[0].text == "abc"
    assert nothing.choices[0].finish_reason == "length"


def test_tokens_as_prompt(client: openai.OpenAI, model: Model) -> None:
    tokens = model.encode(PROMPT)
    response = client.completions.create(model=BACKBONE, prompt=tokens, max_tokens=8, temperature=0)
    assert response.choices[0].text == model.generate(PROMPT, 8).text


def test_errors_arrive_as_the_client_s_exceptions(
    client: openai.OpenAI, server: ServerProcess
) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="a")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="128 tokens") as long:
        client.completions.create(model=BACKBONE, prompt="a" * 20, max_tokens=200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
        client.chat.completions.create(
            model=BACKBONE,
            messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    with (
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_async_client(server: ServerProcess, model: Model) -> None:
    import openai

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:

            async def stream(name: str) -> str:
                parts = await client.completions.create(
                    model=name, prompt=PROMPT, max_tokens=24, temperature=0, stream=True
                )
                return "".join([part.choices[0].text async for part in parts])

            return await asyncio.gather(*(stream(name) for name in (BACKBONE, "math", "prose")))

    assert asyncio.run(ask()) == [
        model.generate(PROMPT, 24, adapter=adapter).text for adapter in (None, "math", "prose")
    ]
