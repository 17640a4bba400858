"""``eoracc verify``: check that an artifact is still what was built."""

from __future__ import annotations

from pathlib import Path

import click

from eoracc.compiler.commands.common import PATH, json_option, print_json

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["verify"]


@click.command()
@click.argument("artifact", type=PATH)
@json_option
@click.pass_context
def verify(ctx: click.Context, artifact: Path, as_json: bool) -> None:
    """Check every byte of ARTIFACT, then that it still computes what it was built to compute."""
    from eoracc.compiler.report import parity_line
    from eoracc.runtime.manifest import verify_manifest

    manifest = verify_manifest(artifact)

    from eoracc.runtime.parity import check_parity

    parity = check_parity(artifact)
    if as_json:
        print_json(
            {
                "passed": parity.passed,
                "digest": manifest.digest,
                "files": len(manifest.files),
                "parity": parity.as_dict(),
            }
        )
    else:
        click.echo(f"files: {len(manifest.files)} are what {artifact / 'manifest.json'} says")
        click.echo(parity_line(parity.as_dict()))
    if not parity.passed:
        ctx.exit(1)
