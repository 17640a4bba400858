"""``eoracc run``: generate text with an artifact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from eoracc.compiler.commands.common import (
    PATH,
    backend_option,
    json_option,
    print_backend,
    print_json,
    print_text,
    trust_options,
)
from eoracc.documents import Reader
from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from eoracc.runtime import BackendChoice, Completion, Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["run"]


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("prompt", default="-")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Use the chat template; default: yes if the model has one.",
)
@click.option(
    "--chat-template",
    "template",
    metavar="NAME",
    help="Chat template, for models with several.",
)
@click.option(
    "--chat-template-kwargs",
    "template_kwargs",
    metavar="JSON",
    help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="Adapter of the artifact. May be repeated: the weighted sum is used.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most likely token.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample from this many most likely tokens; 0: from all.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the smallest set of tokens with this share of the probability.",
)
@click.option(
    "--min-p",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Exclude tokens less likely than this share of the most likely token.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@click.option(
    "--stop",
    "stops",
    multiple=True,
    metavar="TEXT",
    help="Stop before this text, which is not printed. May be repeated.",
)
@click.option(
    "--stop-token-id",
    "stop_token_ids",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="ID",
    help="Stop at this token, besides the model's end tokens. May be repeated.",
)
@click.option(
    "--min-new-tokens",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Do not stop before this many tokens.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Make tokens of the prompt and the answer less likely; 1: do not.",
)
@click.option(
    "--logprobs",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --json: add the log probability of each token and the N most likely tokens.",
)
@backend_option
@trust_options
@json_option
def run(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool | None,
    template: str | None,
    template_kwargs: str | None,
    adapters: tuple[str, ...],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    stops: tuple[str, ...],
    stop_token_ids: tuple[int, ...],
    min_new_tokens: int,
    repetition_penalty: float,
    logprobs: int | None,
    backend: BackendChoice,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Generate text with ARTIFACT from PROMPT, or from standard input if PROMPT is - or absent."""
    from eoracc.runtime import ChatOptions, Request, load

    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs is part of what --json prints: give both")
    if template is not None or template_kwargs is not None:
        if chat is False:
            raise click.UsageError("--no-chat excludes options of the chat template")
        chat = True
    chat_options = ChatOptions(template=template, template_kwargs=_parse_kwargs(template_kwargs))
    weights = _parse_adapters(adapters)
    if prompt == "-":
        prompt = _read_prompt()
    # Others need not be read, let alone be held in memory.
    model = load(
        artifact,
        adapters=list(weights),
        backend=backend,
        trust=trust,
        digest=digest,
        public_key=public_key,
    )
    print_backend(model)
    in_chat = model.has_chat_template if chat is None else chat
    request = Request(
        prompt=prompt,
        chat=in_chat,
        chat_options=chat_options,
        adapter=weights,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stops,
        stop_token_ids=stop_token_ids,
        min_new_tokens=min_new_tokens,
        repetition_penalty=repetition_penalty,
        logprobs=logprobs,
    )
    if as_json:
        (completion,) = model.generate_batch([request])
        content = {"prompt": prompt, "chat": in_chat, "adapter": weights, "text": completion.text}
        content |= {"backend": model.backend, "device": model.device}
        print_json(content | _details(model, completion))
        return
    for piece in model.stream(request):
        print_text(piece.text)
    click.echo()


def _parse_adapters(adapters: tuple[str, ...]) -> dict[str, float]:
    """Weights by name; the default is 1."""
    weights: dict[str, float] = {}
    for text in adapters:
        name, equals, weight = text.partition("=")
        if name in weights:
            raise click.UsageError(f"--adapter {name}: is given twice: give it one weight")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            raise click.UsageError(f"--adapter {text}: its weight is no number") from None
    return weights


def _parse_kwargs(text: str | None) -> dict[str, Any]:
    """Variables of the chat template."""
    reader = Reader(ConfigError, "give an object, as '{\"enable_thinking\": false}'")
    option = "--chat-template-kwargs"
    return reader.as_object(reader.parse(text or "{}", option), option)


def _details(model: Model, completion: Completion) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": list(completion.tokens),
    }
    if completion.logprobs is not None:
        details["logprobs"] = [
            {
                "token": token.token,
                "text": model.decode([token.token]),
                "logprob": token.logprob,
                "top": [
                    {"token": token, "text": model.decode([token]), "logprob": logprob}
                    for token, logprob in token.top
                ],
            }
            for token in completion.logprobs
        ]
    return details


def _read_prompt() -> str:
    if sys.stdin is None:
        raise click.UsageError("standard input is closed: give the prompt as an argument")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError("the prompt on standard input is not UTF-8 text") from None
