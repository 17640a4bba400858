"""``eoracc engine``: build a TensorRT engine on a machine with TensorRT and a GPU."""

from __future__ import annotations

from pathlib import Path

import click

from eoracc.compiler.commands.common import (
    PATH,
    json_option,
    make_console,
    noting_lost_signature,
    print_json,
    say,
    trust_options,
)

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["engine"]


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--compute-capability",
    metavar="X.Y",
    help="Build only if the GPU has this compute capability.  [default: any]",
)
@click.option(
    "--output",
    type=PATH,
    help="Folder for the engine and engines.json.  [default: the bundle]",
)
@click.option("--force", is_flag=True, help="Replace an existing engine for this GPU.")
@trust_options
@json_option
def engine(
    bundle: Path,
    compute_capability: str | None,
    output: Path | None,
    *,
    force: bool,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Build the engine of BUNDLE for the GPU of this machine.

    BUNDLE is an artifact with the target tensorrt, or that target's folder.
    """
    from eoracc.compiler.progress import ConsoleProgress, SilentProgress
    from eoracc.compiler.targets.tensorrt.engines.from_bundle import build_from_bundle
    from eoracc.runtime.artifact.authenticity import Authenticity

    progress = SilentProgress() if as_json else ConsoleProgress(make_console(err=True))
    with noting_lost_signature(bundle):
        made = build_from_bundle(
            bundle,
            progress=progress,
            compute_capability=compute_capability,
            output=output,
            force=force,
            trust=trust,
            authenticity=Authenticity(digest, public_key),
        )
    if as_json:
        print_json(
            {
                "engine": str(made.path),
                "compute_capability": made.compute_capability,
                "device": made.device,
                "summary": dict(made.summary),
            }
        )
        return
    size = made.path.stat().st_size
    say(f"wrote {made.path}, {size:,} bytes, for {made.device} ({made.compute_capability})")
