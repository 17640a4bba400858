"""``eoracc verify``: check the bytes, the tokens and the parity of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from eoracc.compiler.commands.common import PATH, json_option, print_json, say, trust_options

if TYPE_CHECKING:
    from eoracc.runtime import BackendChoice
    from eoracc.runtime.parity.engines import EngineParity
    from eoracc.runtime.parity.tokens import TokenDifference

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["verify"]


@click.command()
@click.argument("artifact", type=PATH)
@click.option(
    "--backend",
    type=click.Choice(["auto", "onnxruntime", "tensorrt_rtx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="Backends to check. auto: all that this machine can run; onnxruntime: graphs on the CPU; "
    "the others: also their engines, which must run on this machine.",
)
@trust_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    artifact: Path,
    *,
    backend: BackendChoice,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
    as_json: bool,
) -> None:
    """Check the bytes of ARTIFACT against its manifest, its tokens, and its parity with PyTorch."""
    from eoracc.compiler.report.lines import parity_line
    from eoracc.runtime.artifact.authenticity import Authenticity
    from eoracc.runtime.artifact.manifest import opening

    with opening(artifact, Authenticity(digest, public_key)) as manifest:
        from eoracc.runtime.decode.codec import Codec
        from eoracc.runtime.onnxruntime.native_library import choose_library
        from eoracc.runtime.parity.check import check_parity
        from eoracc.runtime.parity.engines import check_engines
        from eoracc.runtime.parity.tokens import compare_tokens, read_token_cases

        library = None
        if "model.onnx" in manifest.files:
            library = choose_library(artifact, manifest, trust=trust)
        cases = read_token_cases(artifact)
        difference = compare_tokens(Codec(artifact), cases)
        engines = check_engines(artifact, manifest, backend, trust=trust)
        parity = check_parity(artifact, True if library is None else library.path)
    passed = difference is None and parity.passed and all(engine.passed for engine in engines)
    if as_json:
        print_json(
            {
                "passed": passed,
                "digest": manifest.digest,
                "files": len(manifest.files),
                "tokens": {
                    "texts": len(cases),
                    "difference": None if difference is None else str(difference),
                },
                "library": None if library is None else str(library.path),
                "parity": parity.as_dict(),
                "engines": [engine.as_dict() for engine in engines],
            }
        )
    else:
        say(f"files: {len(manifest.files)} are what {artifact / 'manifest.json'} says")
        if library is not None and library.note is not None:
            say(f"library: {library.note}")
        say(_tokens_line(len(cases), difference))
        say(parity_line(parity.as_dict()))
        for engine in engines:
            say(_engine_line(engine))
    if not passed:
        ctx.exit(1)


def _tokens_line(texts: int, difference: TokenDifference | None) -> str:
    if difference is not None:
        return f"tokens: FAILED: {difference}"
    return f"tokens: those of the checkpoint ({texts} texts)" if texts else "tokens: no record"


def _engine_line(engine: EngineParity) -> str:
    if engine.not_run is not None:
        return f"engines of {engine.backend}: not run: {engine.not_run}"
    outcome = "passed" if engine.passed else "FAILED"
    share = max(case.max_error / case.tolerance for case in engine.logits)
    return (
        f"engines of {engine.backend} on {engine.device}: {outcome}, "
        f"largest deviation {share:.0%} of its tolerance on logits ({len(engine.logits)} cases)"
    )
