"""Options of ``eoracc run``: what they select reaches the model, mistakes are one sentence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from tests.tiny_artifact import tiny_factors, tiny_slots, write_tiny_artifact

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_artifact(tmp_path_factory.mktemp("run"), adapter_type="int8")
    slots = tiny_slots(folder)
    for seed, name in enumerate(("math", "prose")):
        factors = tiny_factors(slots, rank=4, seed=seed, size=2.0)
        add_adapter(folder, Adapter(name, factors, read_manifest(folder).digest))
    return folder


def run(artifact: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["run", str(artifact), "abc", "--no-chat", "--max-new-tokens", "16", *options]
    )


def made(artifact: Path, *options: str) -> dict[str, object]:
    result = run(artifact, "--json", *options)
    assert result.exit_code == 0, result.output
    content: dict[str, object] = json.loads(result.stdout)
    return content


def test_adapters_and_their_sums(artifact: Path) -> None:
    asked: list[tuple[str, ...]] = [
        (),
        ("--adapter", "math"),
        ("--adapter", "prose"),
        ("--adapter", "math=0.5", "--adapter", "prose=-2"),
    ]
    answers = [made(artifact, *options) for options in asked]
    assert [one["adapter"] for one in answers] == [
        {},
        {"math": 1.0},
        {"prose": 1.0},
        {"math": 0.5, "prose": -2.0},
    ]
    assert len({str(one["tokens"]) for one in answers}) == 4
    assert made(artifact, "--adapter", "math=1e0")["tokens"] == answers[1]["tokens"]


def test_streams_what_json_says(artifact: Path) -> None:
    options = ("--adapter", "math", "--temperature", "1.2", "--top-k", "9", "--min-p", "0.01")
    seeded = (*options, "--seed", "3")
    assert run(artifact, *seeded).stdout == f"{made(artifact, *seeded)['text']}\n"
    assert made(artifact, *options, "--seed", "4")["tokens"] != made(artifact, *seeded)["tokens"]


def test_stop_text_is_left_out(artifact: Path) -> None:
    text = str(made(artifact)["text"])
    stopped = made(artifact, "--stop", "never", "--stop", text[-2:])
    assert stopped["text"] == text[: text.index(text[-2:])]
    assert stopped["finish_reason"] == "stop"


def test_stop_tokens_and_repetition(artifact: Path) -> None:
    free = made(artifact)
    tokens = free["tokens"]
    assert isinstance(tokens, list)
    end = ("--stop-token-id", str(tokens[3]))
    assert made(artifact, *end)["tokens"] == tokens[: tokens.index(tokens[3])]
    later = made(artifact, *end, "--min-new-tokens", "8")["tokens"]
    assert isinstance(later, list)
    assert len(later) >= 8
    assert made(artifact, "--repetition-penalty", "5")["tokens"] != tokens


def test_log_probabilities(artifact: Path) -> None:
    content = made(artifact, "--logprobs", "2")
    assert content["prompt_tokens"] == 3
    listed = content["logprobs"]
    assert isinstance(listed, list)
    assert [one["token"] for one in listed] == content["tokens"]
    for one in listed:
        assert one["logprob"] <= 0
        assert [best["logprob"] for best in one["top"]] == sorted(
            (best["logprob"] for best in one["top"]), reverse=True
        )
        assert one["top"][0]["token"] == one["token"]  # greedy
    assert "logprobs" not in made(artifact)


def test_variables_of_the_chat_template(artifact: Path) -> None:
    def prompt_tokens(*options: str) -> int:
        command = ["run", str(artifact), "abc", "--json", "--max-new-tokens", "1", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        return int(json.loads(result.stdout)["prompt_tokens"])

    alone = prompt_tokens()
    assert prompt_tokens("--chat-template-kwargs", '{"opening": "four"}') == alone + 4
    assert prompt_tokens("--chat-template", "default", "--chat") == alone


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--chat-template-kwargs", "{}"), "--no-chat excludes options of the chat template"),
        (
            ("--chat", "--chat-template-kwargs", "[]"),
            "--chat-template-kwargs: is a list where a JSON object is expected",
        ),
        (("--chat", "--chat-template-kwargs", "{"), "--chat-template-kwargs: is not valid JSON"),
        (
            ("--chat", "--chat-template-kwargs", '{"messages": []}'),
            "chat_template_kwargs: 'messages' has an option of its own",
        ),
        (("--chat", "--chat-template", "rag"), "chat template 'rag': is none of default"),
        (("--adapter", "poems"), "has no adapter 'poems': it has math, prose"),
        (("--adapter", "math=much"), "--adapter math=much: its weight is no number"),
        (
            ("--adapter", "math=nan"),
            "adapter 'math': its weight must be from -10000 to 10000, not nan",
        ),
        (("--adapter", "math", "--adapter", "math=2"), "--adapter math: is given twice"),
        (("--logprobs", "1"), "--logprobs is part of what --json prints: give both"),
        (("--stop", ""), "stop: a stop string may not be empty"),
        (("--stop-token-id", "260"), "stop_token_ids: there is no token 260: the model has 0 to"),
        (("--min-new-tokens", "999"), "min_new_tokens: must be from 0 to max_new_tokens"),
        (("--repetition-penalty", "nan"), "repetition_penalty: must be above 0, and finite"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(artifact: Path, options: tuple[str, ...], problem: str) -> None:
    result = run(artifact, *options)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "Traceback" not in result.output
