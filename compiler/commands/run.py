"""``eoracc run``: let an artifact continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import PATH, json_option, print_json

if TYPE_CHECKING:
    from eoracc.runtime.model import Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["run"]


@click.command()
@click.argument("artifact", type=PATH)
@click.argument("prompt", default="-")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--chat/--no-chat", default=None, help="Use the chat template; the default where there is one."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the most likely token every time.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="Makes sampling repeatable.")
@json_option
def run(
    artifact: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    chat: bool | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    as_json: bool,
) -> None:
    """Let ARTIFACT continue PROMPT, or standard input where PROMPT is - or left out."""
    from eoracc.runtime import load

    if prompt == "-":
        prompt = _read_prompt()
    model: Model = load(artifact)
    in_chat = model.has_chat_template if chat is None else chat
    pieces = model.generate(
        prompt,
        max_new_tokens,
        chat=in_chat,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if as_json:
        print_json({"prompt": prompt, "chat": in_chat, "text": "".join(pieces)})
        return
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError("the prompt on standard input is not UTF-8 text") from None
