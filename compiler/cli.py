"""The command line: ``eoracc build | compare | run | verify | inspect | passes | schema``.

Exit codes: 0 all is well, 1 a gate failed, 2 bad input, 130 interrupted. With ``--json`` standard
output holds one JSON value and nothing else, errors included (``compare`` writes it to a file). A
command is a module of ``commands``, and imports what it needs when it runs: ``eoracc --help``
answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
from typing_extensions import override

from eoracc import __version__
from eoracc.compiler.commands.adapter import adapter
from eoracc.compiler.commands.bench import bench
from eoracc.compiler.commands.build import build
from eoracc.compiler.commands.compare import compare
from eoracc.compiler.commands.engine import engine
from eoracc.compiler.commands.inspect import inspect
from eoracc.compiler.commands.passes import passes
from eoracc.compiler.commands.run import run
from eoracc.compiler.commands.schema import schema
from eoracc.compiler.commands.serve import serve
from eoracc.compiler.commands.verify import verify
from eoracc.errors import EoraccError

__all__ = ["main"]

_JSON = "eoracc.json"
_INTERRUPTED = 130
_RESUMABLE = ("build", "compare")
_JSON_TO_FILE = ("compare",)
_BROKEN_PIPE = 141


class _Main(click.Group):
    """Turn errors that are raised on purpose into one sentence and an exit code."""

    @override
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # Known before options are parsed: a mistake in them is an error like any other.
        options = args[: args.index("--")] if "--" in args else args
        ctx.meta[_JSON] = "--json" in options and args[0] not in _JSON_TO_FILE
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
            if ctx.invoked_subcommand in _RESUMABLE:
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


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="eoracc")
def main() -> None:
    """Compress language models and compensate the loss with low-rank factors."""


for _command in (
    build,
    compare,
    run,
    verify,
    inspect,
    passes,
    schema,
    bench,
    serve,
    adapter,
    engine,
):
    main.add_command(_command)


if __name__ == "__main__":
    main(prog_name="eoracc")
