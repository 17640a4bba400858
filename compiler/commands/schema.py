"""``eoracc schema``: the JSON schema of model.yaml."""

from __future__ import annotations

import click

from eoracc.compiler.commands.common import print_json

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["schema"]


@click.command()
def schema() -> None:
    """Print the JSON schema of model.yaml."""
    from eoracc.compiler.config.schema import json_schema

    print_json(json_schema())
