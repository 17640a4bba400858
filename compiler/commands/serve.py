"""``eoracc serve``: an OpenAI-compatible server for one artifact."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from typing_extensions import override

from eoracc.compiler.commands.common import (
    PATH,
    backend_lines,
    backend_option,
    trust_options,
)
from eoracc.errors import BackendError
from eoracc.log_lines import LogFormat

if TYPE_CHECKING:
    from eoracc.runtime import BackendChoice, Model

# ruff: noqa: PLC0415 - imports are heavy and a command needs few of them

__all__ = ["serve"]

_POSITIVE = click.IntRange(min=1)


class _Seconds(click.FloatRange):
    """A time above zero; comparisons alone would let NaN pass."""

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


_SECONDS = _Seconds(min=0, min_open=True)


@click.command()
@click.argument("artifact", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="Port; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="EORACC_API_KEY",
    show_envvar=True,
    help="Bearer token that requests must carry. Prefer the environment variable: others can "
    "see a process's arguments.",
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="Host name that requests may ask for besides localhost; may be repeated; '*' for all. "
    "By default all where --host is an address that other machines reach.",
)
@click.option("--model-name", help="Name of the backbone; default: the folder's name.")
@click.option(
    "--threads", type=_POSITIVE, help="Threads of one operator; default: one per processor."
)
@click.option(
    "--rows",
    type=_POSITIVE,
    default=8,
    show_default=True,
    help="Answers that are generated at the same time.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=2),
    help="Limit of the tokens of a prompt and its answer; default: the model's. Bounds memory.",
)
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Answers that may wait; requests beyond get status 429.",
)
@click.option(
    "--max-choices",
    type=_POSITIVE,
    default=8,
    show_default=True,
    help="Limit of the answers of one request: prompts times n.",
)
@click.option("--max-prompt-tokens", type=_POSITIVE, help="Limit of the tokens of one prompt.")
@click.option("--max-tokens", type=_POSITIVE, help="Limit of the tokens of one answer.")
@click.option("--max-body-bytes", type=_POSITIVE, default=1 << 20, show_default=True)
@click.option(
    "--queue-timeout",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds that an answer may wait to be started.",
)
@click.option(
    "--request-timeout",
    type=_SECONDS,
    default=300.0,
    show_default=True,
    help="Limit of the seconds from the arrival of a request to the end of its answer.",
)
@click.option(
    "--grace",
    type=_Seconds(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that running requests have to finish after SIGTERM.",
)
@click.option(
    "--max-connections",
    type=_POSITIVE,
    default=1000,
    show_default=True,
    help="Connections that may be open. A further one takes the place of one without a request.",
)
@click.option(
    "--max-connections-per-address",
    type=_POSITIVE,
    help="Connections that one client address may have open; default: no limit of its own.",
)
@click.option(
    "--header-timeout",
    type=_SECONDS,
    default=10.0,
    show_default=True,
    help="Seconds that a client has to send the headers of a request.",
)
@click.option(
    "--body-timeout",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds that a client has to send the body of a request.",
)
@click.option(
    "--keep-alive",
    type=_POSITIVE,
    default=15,
    show_default=True,
    help="Seconds that a connection stays open between two requests.",
)
@click.option(
    "--send-timeout",
    type=_SECONDS,
    default=30.0,
    show_default=True,
    help="Seconds that a client has to read what was sent to it.",
)
@click.option(
    "--log-format",
    type=click.Choice(get_args(LogFormat)),
    default="text",
    show_default=True,
    help="Form of the log on standard error: lines for people, or JSON.",
)
@click.option("--access-log/--no-access-log", default=True, show_default=True)
@backend_option
@trust_options
def serve(
    artifact: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    allowed_hosts: tuple[str, ...],
    model_name: str | None,
    threads: int | None,
    rows: int,
    context_length: int | None,
    max_waiting: int,
    max_choices: int,
    max_prompt_tokens: int | None,
    max_tokens: int | None,
    max_body_bytes: int,
    queue_timeout: float,
    request_timeout: float,
    grace: float,
    max_connections: int,
    max_connections_per_address: int | None,
    header_timeout: float,
    body_timeout: float,
    keep_alive: int,
    send_timeout: float,
    log_format: LogFormat,
    access_log: bool,
    backend: BackendChoice,
    trust: bool,
    digest: str | None,
    public_key: Path | None,
) -> None:
    """Serve ARTIFACT and its adapters through an OpenAI-compatible API."""
    try:
        from eoracc.runtime.server.connections.limits import ConnectionLimits
        from eoracc.runtime.server.connections.quiet_log import set_up_logging
        from eoracc.runtime.server.hosts import HostRule, is_loopback
        from eoracc.runtime.server.options import ServerOptions
        from eoracc.runtime.server.process import listen, run
        from eoracc.runtime.server.served.artifact import open_artifact
        from eoracc.runtime.server.service import Service
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed: pip install 'eoracc[serve]'") from None

    set_up_logging(log_format, access_log=access_log)
    log = logging.getLogger("eoracc.server")

    def log_backend(model: Model) -> None:
        for line in backend_lines(model):
            log.info("%s", line)

    # Before the model is loaded: an address that cannot be had needs no waiting for.
    with listen(host, port) as listener:
        address, bound = listener.getsockname()[:2]
        options = ServerOptions(
            api_key=api_key,
            max_waiting=max_waiting,
            max_choices=max_choices,
            max_body_bytes=max_body_bytes,
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            queue_timeout_s=queue_timeout,
            request_timeout_s=request_timeout,
            grace_s=grace,
            hosts=HostRule(address, allowed_hosts),
            connections=ConnectionLimits(
                max_connections=max_connections,
                max_per_address=max_connections_per_address,
                header_timeout_s=header_timeout,
                body_timeout_s=body_timeout,
                keep_alive_s=keep_alive,
                send_timeout_s=send_timeout,
            ),
        )
        served = open_artifact(
            artifact,
            rows=rows,
            context_length=context_length,
            threads=threads,
            backend=backend,
            trust=trust,
            digest=digest,
            public_key=public_key,
            on_load=log_backend,
        )
        service = Service(served, options, model_name=model_name or artifact.resolve().name)
        if api_key is None and not is_loopback(address):
            log.warning("whoever reaches %s is let in: set --api-key", host)
        shown = f"[{address}]" if ":" in address else address
        models = ", ".join((service.catalog.backbone, *service.catalog.adapters))

        def ready() -> None:
            log.info("serving %s at http://%s:%d/v1", models, shown, bound)

        run(service, listener, on_ready=ready)
