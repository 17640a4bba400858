"""How each kind of file is read: by the command line where it is quick, else by the same calls."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.fuzz.mutations import Random
from tests.fuzz.replies import Reply, call, command
from tests.fuzz.templates import ADAPTER

if TYPE_CHECKING:
    from eoracc.compiler.frontend.load import LoadedModel

__all__ = [
    "FAULTY",
    "ask_server",
    "convert_or_inspect",
    "import_adapter",
    "load_checkpoint",
    "load_or_inspect",
    "load_tokenizer",
    "read_artifact",
    "read_configuration",
    "read_texts",
    "use_templates",
]

_templates = Path()


def use_templates(root: Path) -> None:
    """Say where the sound files are; some readers keep one of them open."""
    global _templates  # noqa: PLW0603 - one per process
    _templates = root


# --- checkpoints ----------------------------------------------------------------------------------


def load_checkpoint(case: Path, _rng: Random) -> Reply:
    """What a build does before its first pass: graph, tokenizer, genai_config.json."""
    (source,) = (case / name for name in ("checkpoint", "shards") if (case / name).is_dir())
    return call(lambda: _ship(_load(source, case), case))


def load_or_inspect(case: Path, rng: Random) -> Reply:
    if rng.random() < 0.3:
        return command("inspect", case / "checkpoint", *rng.choice(((), ("--json",))))
    return load_checkpoint(case, rng)


def convert_or_inspect(case: Path, rng: Random) -> Reply:
    file = case / "gguf" / "model.gguf"
    if rng.random() < 0.3:
        return command("inspect", file)
    return call(lambda: _ship(_load(file, case), case))


def load_tokenizer(case: Path, _rng: Random) -> Reply:
    """What a build does with the files of a tokenizer; the weights are those of the template."""
    from dataclasses import replace

    from eoracc.compiler.frontend.bounds import TensorBounds
    from eoracc.compiler.frontend.files import check_json_files, check_tokenizer_json

    (source,) = (case / name for name in ("checkpoint", "sentencepiece") if (case / name).is_dir())

    def load() -> None:
        check_json_files(source)
        shapes = [(260, 48)]
        TensorBounds.of(shapes).check_token_files(source)
        check_tokenizer_json(source)
        _ship(replace(_sound(), folder=source), case)

    return call(load)


def _load(source: Path, case: Path) -> LoadedModel:
    from eoracc.compiler.frontend.load import load

    return load(str(source), work=case / "work")


@cache
def _sound() -> LoadedModel:
    return _load(_templates / "checkpoint", _templates)


def _ship(loaded: LoadedModel, case: Path) -> None:
    """Write the files that depend on the checkpoint's own, as a build does."""
    from eoracc.compiler.chat.ship import ChatTemplates, ship_chat
    from eoracc.compiler.targets.genai_config import genai_config
    from eoracc.compiler.targets.tokens import ship_tokenizer, tokenizer_report

    folder = case / "shipped"
    tokenizer = loaded.tokenizer()
    loaded.limits()
    shipped = ship_tokenizer(loaded, tokenizer, folder)
    # The graph is not lowered: the file depends on its inputs alone.
    config = genai_config(loaded.config, loaded.model, generation=loaded.generation)
    (folder / "genai_config.json").write_text(json.dumps(config, allow_nan=False))
    ship_chat(ChatTemplates.of(tokenizer), folder, genai=True)
    tokenizer_report(folder, shipped, ["onnxruntime"])


# --- artifacts and adapters -----------------------------------------------------------------------


def read_artifact(case: Path, rng: Random) -> Reply:
    """One of the commands that open an artifact; those that are quick come more often."""
    artifact = case / "artifact"
    commands: list[tuple[object, ...]] = [
        ("inspect", artifact),
        ("inspect", "--json", artifact),
        ("run", artifact, "ab", "--max-new-tokens", "2"),
        ("run", "--json", artifact, "ab", "--max-new-tokens", "2", "--logprobs", "2"),
        (
            "run",
            artifact,
            "ab",
            "--no-chat",
            "--max-new-tokens",
            "2",
            "--adapter",
            f"{ADAPTER}=0.5",
        ),
        ("adapter", "list", artifact),
        ("adapter", "list", "--json", artifact),
        ("adapter", "export", artifact, ADAPTER, "--to", case / "out"),
        ("adapter", "export", artifact, ADAPTER, "--to", case / "out", "--format", "onnx"),
        ("adapter", "remove", artifact, ADAPTER),
        ("verify", artifact),
        ("engine", artifact),
    ]
    if (case / "checkpoint").is_dir() and rng.random() < 0.2:
        data = ("--data", case / "project" / "text.txt", "--model", case / "checkpoint")
        sizes = ("--samples", "2", "--sequence-length", "16", "--windows", "1", "--rank", "2")
        return command("adapter", "add", artifact, "--name", "new", *data, *sizes)
    if rng.random() < 0.15:
        return call(lambda: _open_for_server(artifact))
    return command(*rng.choice(commands))


def _open_for_server(artifact: Path) -> None:
    from eoracc.runtime.server.served.artifact import open_artifact

    open_artifact(artifact, rows=1, threads=1).close()


def import_adapter(case: Path, _rng: Random) -> Reply:
    return command("adapter", "import", case / "artifact", case / "peft", "--name", "new")


# --- a project ------------------------------------------------------------------------------------


def read_configuration(case: Path, rng: Random) -> Reply:
    """A model.yaml whose model is missing: nothing is built, at most refused later."""
    path = case / "project" / "model.yaml"
    if rng.random() < 0.3:
        from eoracc.compiler.config.load import load_config

        return call(lambda: load_config(path).resolved())
    return command(rng.choice(("build", "compare")), path)


def read_texts(case: Path, rng: Random) -> Reply:
    """Windows for statistics from a text that is changed."""
    from eoracc.compiler.config.sections import CalibrationConfig, HeldOutConfig
    from eoracc.compiler.text.windows import calibration_windows

    lines = (case / "project" / "chats.jsonl").exists() and rng.random() < 0.7
    source = {"text": "chats.jsonl", rng.choice(("field", "messages")): "text"} if lines else {}
    if "messages" in source:
        source["messages"] = "messages"
    settings = {
        "samples": 3,
        "sequence_length": 16,
        "layout": rng.choice(("packing", "padding")),
        "seed": rng.choice((None, 1)),
    }
    calibration = CalibrationConfig.model_validate({"text": "text.txt", **source, **settings})

    def read() -> None:
        sound = _sound()
        calibration_windows(
            calibration,
            HeldOutConfig(),
            sound.tokenizer(),
            config_dir=case / "project",
            limits=sound.limits(),
        )

    return call(read)


# --- the server -----------------------------------------------------------------------------------


def ask_server(case: Path, rng: Random) -> Reply:
    """A status of 5xx is a fault: the body is the client's."""
    body = (case / "chat" / "body.json").read_bytes()
    post = _post(rng.choice(("chat/completions", "completions")), body)
    status, text = _loop().run_until_complete(post)
    if status >= 500:
        return Reply(3, text, text)
    return Reply(0 if status == 200 else 2, "" if status == 200 else text)


async def _post(path: str, body: bytes) -> tuple[int, str]:
    import httpx

    from eoracc.runtime.server.app import create_app

    transport = httpx.ASGITransport(create_app(_service()))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        headers = {"Content-Type": "application/json"}
        response = await client.post(f"/v1/{path}", content=body, headers=headers)
        return response.status_code, response.text


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all requests, as a server has."""
    return asyncio.new_event_loop()


@cache
def _service() -> Any:  # noqa: ANN401 - imported late
    from eoracc.runtime.server.options import ServerOptions
    from eoracc.runtime.server.served.artifact import open_artifact
    from eoracc.runtime.server.service import Service

    served = open_artifact(_templates / "artifact", rows=2, threads=1)
    return Service(served, ServerOptions(), model_name="artifact")


# --- readers with a fault -------------------------------------------------------------------------


def _raise(_case: Path, _rng: Random) -> Reply:
    raise KeyError("a field")


def _die(_case: Path, _rng: Random) -> Reply:
    os.kill(os.getpid(), signal.SIGKILL)
    return Reply(0)


def _sleep(_case: Path, _rng: Random) -> Reply:
    time.sleep(3600)
    return Reply(0)


def _spin(_case: Path, _rng: Random) -> Reply:
    while True:
        pass


def _fill(_case: Path, _rng: Random) -> Reply:
    return Reply(2, f"refused after {len(bytearray(3 << 27))} bytes")


def _mumble(_case: Path, _rng: Random) -> Reply:
    return Reply(2, "\x1b[31m")


def _shout(_case: Path, _rng: Random) -> Reply:
    os.write(2, b"warning\n" * 10_000)
    return Reply(2, "refused")


FAULTY: dict[str, Callable[[Path, Random], Reply]] = {
    "traceback": _raise,
    "signal": _die,
    "hang": _sleep,
    "busy hang": _spin,
    "memory": _fill,
    "unclear": _mumble,
    "noise": _shout,
}
"""By the verdict that they deserve."""
