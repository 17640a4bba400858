"""The command line: ``eoracc build | run | verify | inspect | passes | schema``.

Exit codes: 0 all is well, 1 a gate failed, 2 bad input, 130 interrupted. With ``--json`` standard
output holds one JSON value and nothing else, errors included. What a command needs is imported
when it runs: ``eoracc --help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from typing_extensions import override

from eoracc import EoraccError, __version__

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eoracc.compiler.inspection import ArtifactSummary, CheckpointSummary
    from eoracc.runtime.model import Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["main"]

_JSON = "eoracc.json"
_INTERRUPTED = 130
_BROKEN_PIPE = 141

_PATH = click.Path(path_type=Path)


class _Main(click.Group):
    """Turns errors that are raised on purpose into one sentence and an exit code."""

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Known before options are parsed: a mistake in them is an error like any other.
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[_JSON] = "--json" in options
        return super().resolve_command(ctx, args)

    @override
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EoraccError as error:
            _complain(ctx, str(error))
            ctx.exit(error.exit_code)
        except click.ClickException as error:
            if not ctx.meta.get(_JSON):
                raise
            _complain(ctx, error.format_message())
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            resume = ""
            if ctx.invoked_subcommand == "build":
                resume = ": run the same command again to go on after the last finished block"
            _complain(ctx, f"interrupted{resume}")
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            # Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_BROKEN_PIPE)


def _complain(ctx: click.Context, sentences: str) -> None:
    if ctx.meta.get(_JSON):
        click.echo(json.dumps({"error": sentences}, ensure_ascii=False))
        return
    for sentence in sentences.splitlines():
        click.echo(f"error: {sentence}", err=True)


_json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON value and nothing else.",
)


def _print_json(content: object) -> None:
    click.echo(json.dumps(content, indent=2, ensure_ascii=False))


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eoracc")
def main() -> None:
    """Compress language models and give back what compression took."""


@main.command()
@click.argument("model_yaml", type=_PATH)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATH=VALUE",
    help="Override a setting: calibration.samples=16, passes.eora.rank=0. May be repeated.",
)
@click.option("--force", is_flag=True, help="Replace the artifact that is there.")
@_json_option
def build(model_yaml: Path, overrides: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Build the artifact that MODEL_YAML describes."""
    # Before NumPy and PyTorch are loaded: their threads spin for milliseconds after each product
    # unless told not to, and a build has many products with other work between them.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from eoracc.compiler.artifact import check_output
    from eoracc.compiler.config import load_config

    config = load_config(model_yaml, overrides)
    config_dir = model_yaml.parent
    # Before the heavy imports: what cannot be written needs no waiting for.
    check_output(config.output_path(config_dir), force=force)

    from rich.console import Console

    from eoracc.compiler.driver import build as run_build
    from eoracc.compiler.progress import ConsoleProgress, SilentProgress
    from eoracc.compiler.report import fidelity_table, format_bytes, report_lines

    progress = SilentProgress() if as_json else ConsoleProgress(Console(stderr=True))
    result = run_build(config, config_dir=config_dir, progress=progress, force=force)
    manifest, report = result.manifest, result.report
    if as_json:
        _print_json(
            {
                "output": str(result.output),
                "digest": manifest.digest,
                "report": report.as_dict(),
            }
        )
        return
    console = _console()
    console.print(fidelity_table(report.fidelity.rows))
    for line in report_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    size = sum(entry.size for entry in manifest.files.values())
    console.print(f"wrote {result.output}, {format_bytes(size)}", markup=False, soft_wrap=True)


@main.command()
@click.argument("artifact", type=_PATH)
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
@_json_option
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
        _print_json({"prompt": prompt, "chat": in_chat, "text": "".join(pieces)})
        return
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


def _read_prompt() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise click.UsageError("the prompt on standard input is not UTF-8 text") from None


@main.command()
@click.argument("artifact", type=_PATH)
@_json_option
@click.pass_context
def verify(ctx: click.Context, artifact: Path, as_json: bool) -> None:
    """Check every byte of ARTIFACT, then that it still computes what it was built to compute."""
    from eoracc.compiler.report import parity_line
    from eoracc.runtime.manifest import verify_manifest

    manifest = verify_manifest(artifact)

    from eoracc.runtime.parity import check_parity

    parity = check_parity(artifact)
    if as_json:
        _print_json(
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


@main.command()
@click.argument("path", metavar="ARTIFACT|CHECKPOINT", type=_PATH)
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what is in an artifact, a checkpoint folder or a GGUF file, layer by layer."""
    from eoracc.compiler.inspection import ArtifactSummary, inspect_path

    summary = inspect_path(path)
    if as_json:
        _print_json(summary.as_dict())
    elif isinstance(summary, ArtifactSummary):
        _show_artifact(summary)
    else:
        _show_checkpoint(summary)


def _console() -> Console:
    """For tables on standard output."""
    from rich.console import Console

    class _Piped(Console):
        @override
        def on_broken_pipe(self) -> None:
            # rich would exit with 1, which says that a gate has failed.
            raise BrokenPipeError

    return _Piped(highlight=False)


def _show_artifact(summary: ArtifactSummary) -> None:
    from eoracc.compiler.report import fidelity_table, format_bytes, report_lines

    stages = list(dict.fromkeys(stage for one in summary.report.linears for stage in one.errors))
    table = _table(f"{summary.path}: linears, and their output errors after each pass")
    table.add_column("block", justify="right")
    table.add_column("linear", no_wrap=True)
    for heading in ("shape", "bits", "group", "rank", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="right")
    for one in summary.report.linears:
        table.add_row(
            "" if one.block is None else str(one.block),
            one.role,
            "x".join(map(str, one.shape)),
            "" if one.bits is None else str(one.bits),
            "" if one.group_size is None else str(one.group_size),
            str(one.rank) if one.rank else "",
            format_bytes(one.bytes),
            *(f"{one.errors[stage]:.4f}" if stage in one.errors else "" for stage in stages),
        )
    console = _console()
    console.print(table)
    console.print(fidelity_table(summary.report.fidelity.rows))
    lines = [
        *report_lines(summary.report),
        (
            f"compressed linears: {format_bytes(summary.linear_bytes)}, "
            f"{summary.bits_per_weight:.2f} bits per weight"
        ),
        f"artifact: {format_bytes(summary.bytes)} in {len(summary.manifest.files)} files",
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def _show_checkpoint(summary: CheckpointSummary) -> None:
    from rich.text import Text

    from eoracc.compiler.report import format_bytes

    table = _table(f"{summary.path}: tensors")
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "dtype", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for tensor in summary.tensors:
        shape = "x".join(map(str, tensor.shape))
        table.add_row(Text(tensor.name), shape, tensor.dtype, format_bytes(tensor.bytes))
    console = _console()
    console.print(table)
    console.print(
        f"{len(summary.tensors)} tensors, {summary.parameters:,} parameters, "
        f"{format_bytes(summary.bytes)}"
    )


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


@main.command()
@_json_option
def passes(as_json: bool) -> None:
    """List the passes with their options, defaults and documentation."""
    from eoracc.compiler.schema import describe_passes

    described = describe_passes()
    if as_json:
        _print_json(described)
        return
    for one in described:
        click.secho(one["name"], bold=True)
        click.echo(_indent(one["doc"], 2))
        for option in one["options"]:
            click.echo(f"\n  {option['name']} = {json.dumps(option['default'])}")
            if option["doc"]:
                click.echo(_indent(option["doc"], 6))
        click.echo()


def _indent(text: str, by: int) -> str:
    import textwrap

    return textwrap.indent(text, " " * by)


@main.command()
def schema() -> None:
    """Print the JSON schema of model.yaml."""
    from eoracc.compiler.schema import json_schema

    _print_json(json_schema())


if __name__ == "__main__":
    main(prog_name="eoracc")
