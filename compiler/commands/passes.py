"""``eoracc passes``: list the passes that model.yaml can name."""

from __future__ import annotations

import json

import click

from eoracc.compiler.commands.common import json_option, print_json

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["passes"]


@click.command()
@json_option
def passes(as_json: bool) -> None:
    """List the passes with their options, defaults and documentation."""
    from eoracc.compiler.config.schema import describe_passes

    described = describe_passes()
    if as_json:
        print_json(described)
        return
    for known in described:
        click.secho(known["name"], bold=True)
        click.echo(_indent(known["doc"], 2))
        for option in known["options"]:
            click.echo(f"\n  {option['name']} = {json.dumps(option['default'])}")
            if option["doc"]:
                click.echo(_indent(option["doc"], 6))
        click.echo()


def _indent(text: str, by: int) -> str:
    import textwrap

    return textwrap.indent(text, " " * by)
