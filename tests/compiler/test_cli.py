from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from eoracc.compiler.report.content import Report
from eoracc.compiler.report.inspection import inspect_path
from eoracc.errors import GateError, ModelError
from eoracc.runtime.artifact.folder_lock import lock_folder
from eoracc.runtime.artifact.manifest import read_manifest

if TYPE_CHECKING:
    from eoracc.compiler.config.sections import BuildConfig

YAML = """\
model: m
passes: [quantize_rtn]
verify: {text: t.txt}
output: out
"""

Build = Callable[..., Any]


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


@pytest.fixture
def model_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(YAML)
    return path


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[[Build], None]:
    """Puts a function in the place of the driver's ``build``."""

    def replace(build: Build) -> None:
        monkeypatch.setitem(sys.modules, "eoracc.compiler.driver", SimpleNamespace(build=build))

    return replace


def raising(error: BaseException) -> Build:
    def build(*_: object, **__: object) -> None:
        raise error

    return build


def test_build_hands_over_what_was_asked_for(
    model_yaml: Path, tiny_artifact: Path, driver: Callable[[Build], None]
) -> None:
    asked: dict[str, Any] = {}

    def build(config: BuildConfig, **options: Any) -> SimpleNamespace:  # noqa: ANN401
        asked.update(options, config=config)
        with options["progress"].phase("load", 1) as phase:
            phase.advance()
        summary = inspect_path(tiny_artifact)
        report = getattr(summary, "report", None)
        return SimpleNamespace(
            output=tiny_artifact, manifest=read_manifest(tiny_artifact), report=report
        )

    driver(build)
    result = run("build", model_yaml, "--set", "passes.quantize_rtn.bits=2", "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["output"] == str(tiny_artifact)
    assert content["digest"] == read_manifest(tiny_artifact).digest
    assert Report.from_dict(content["report"]).fidelity.rows[0].perplexity == 12.5
    assert asked["config"].passes[0].bits == 2
    assert asked["config_dir"] == model_yaml.parent
    assert (asked["force"], asked["lean"]) == (False, False)

    result = run("build", model_yaml, "--lean")
    assert asked["lean"] is True
    assert result.exit_code == 0
    assert "12.50" in result.stdout
    assert "parity: not checked" in result.stdout
    assert f"wrote {tiny_artifact}, " in result.stdout
    assert result.stderr.startswith("load: 1 steps\nload: done in ")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ModelError("m: holds NaN"), 2, "m: holds NaN"),
        (GateError("parity failed"), 1, "parity failed"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted: run the same command again to go on from what has been kept",
        ),
    ],
    ids=["bad input", "gate", "interrupt"],
)
def test_errors_are_one_sentence_and_a_code(
    model_yaml: Path,
    driver: Callable[[Build], None],
    error: BaseException,
    code: int,
    sentence: str,
) -> None:
    driver(raising(error))
    result = run("build", model_yaml)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"error: {sentence}\n")
    result = run("build", model_yaml, "--json")
    assert (result.exit_code, result.stderr) == (code, "")
    assert json.loads(result.stdout) == {"error": sentence}


class PanicException(BaseException):
    """As the Rust libraries raise it: not an ``Exception``."""


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("bug"), RecursionError("deep"), PanicException("bug"), EOFError("bug")],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_is_one_sentence(
    model_yaml: Path, driver: Callable[[Build], None], error: BaseException
) -> None:
    driver(raising(error))
    result = run("build", model_yaml)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: internal error: ")
    assert f"{type(error).__name__}: {error}; set EORACC_DEBUG=1" in line
    result = run("build", model_yaml, "--json")
    assert (result.exit_code, result.stderr) == (3, "")
    assert json.loads(result.stdout)["error"] == line.removeprefix("error: ")


@pytest.mark.parametrize("where", ["before", "after", "variable"])
def test_debug_shows_the_trace(
    model_yaml: Path,
    driver: Callable[[Build], None],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    monkeypatch.setenv("EORACC_DEBUG", "1" if where == "variable" else "0")
    driver(raising(ZeroDivisionError("bug")))
    before, after = (["--debug"] if where == place else [] for place in ("before", "after"))
    result = run(*before, "build", model_yaml, *after, "--json")
    assert result.exit_code == 3
    assert "raise error\nZeroDivisionError: bug\n" in result.stderr
    assert list(json.loads(result.stdout)) == ["error"]


def test_every_command_has_the_debug_option() -> None:
    commands: list[click.Command] = [main]
    while commands:
        command = commands.pop()
        assert any("--debug" in parameter.opts for parameter in command.params), command.name
        if isinstance(command, click.Group):
            commands.extend(command.commands.values())


def test_build_refuses_before_it_works(
    model_yaml: Path, driver: Callable[[Build], None], tiny_artifact: Path
) -> None:
    driver(raising(AssertionError("must not be reached")))
    result = run("build", model_yaml, "--set", "modle=3")
    assert result.exit_code == 2
    assert result.stderr == "error: --set modle=3: modle: unknown key: did you mean 'model'?\n"
    result = run("build", model_yaml, "--set", f"output={tiny_artifact}")
    assert result.exit_code == 2
    assert "exists: choose another 'output', or replace it with --force" in result.stderr
    result = run("build", model_yaml.with_name("nowhere.yaml"))
    assert result.exit_code == 2
    assert "there is no such file" in result.stderr


def test_every_mistake_has_its_own_line(model_yaml: Path) -> None:
    model_yaml.write_text(YAML.replace("model: m", "modle: m"))
    lines = run("build", model_yaml).stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {model_yaml}") for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "x", "--jsno", "--json"),
        ("inspect", "--json"),
        ("nothing", "--json"),
        ("--jsno", "--json"),
        ("adapter", "lsit", "--json"),
        ("run", "x", "y", "--top-p", "2", "--json"),
        ("inspect", "nowhere", "--json"),
    ],
    ids=" ".join,
)
def test_json_holds_wrong_usage_too(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (2, "")
    assert list(json.loads(result.stdout)) == ["error"]


def test_wrong_usage_without_json_is_explained() -> None:
    result = run("inspect")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Missing argument 'ARTIFACT|CHECKPOINT'" in result.stderr


def test_run_streams_the_continuation(tiny_artifact: Path) -> None:
    greedy = run("run", tiny_artifact, "abc", "--max-new-tokens", "24", "--no-chat")
    assert greedy.exit_code == 0, greedy.output
    assert greedy.stdout.endswith("\n")
    piped = run("run", tiny_artifact, "--max-new-tokens", "24", "--no-chat", stdin="abc")
    assert piped.stdout == greedy.stdout
    as_json = run("run", tiny_artifact, "abc", "--max-new-tokens", "24", "--no-chat", "--json")
    content = json.loads(as_json.stdout)
    assert (content["prompt"], content["chat"]) == ("abc", False)
    assert content["text"] == greedy.stdout[:-1]


def test_run_chats_where_there_is_a_template(tiny_artifact: Path) -> None:
    content = json.loads(run("run", tiny_artifact, "abc", "--max-new-tokens", "2", "--json").stdout)
    assert content["chat"] is True


def test_run_refuses_bad_prompts(tiny_artifact: Path) -> None:
    result = run("run", tiny_artifact, "--no-chat", stdin="")
    assert result.exit_code == 2
    assert "the prompt is empty" in result.stderr
    result = run("run", tiny_artifact, stdin=b"\xff")
    assert result.exit_code == 2
    assert "is not UTF-8 text" in result.stderr


def test_run_refuses_a_changed_byte(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    content = bytearray((folder / "model.onnx.data").read_bytes())
    content[7] ^= 1
    (folder / "model.onnx.data").write_bytes(content)
    for command in (("run", folder, "abc"), ("verify", folder)):
        result = run(*command)
        assert result.exit_code == 2
        assert "model.onnx.data: its content is not what manifest.json says" in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize("passed", [True, False])
def test_verify_repeats_parity(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    figures = {"passed": passed, "linears": [], "logits": []}
    parity = SimpleNamespace(passed=passed, as_dict=lambda: figures)
    monkeypatch.setattr("eoracc.runtime.parity.check.check_parity", lambda *_: parity)
    result = run("verify", tiny_artifact)
    assert result.exit_code == (0 if passed else 1)
    outcome = "passed" if passed else "FAILED"
    assert f"parity: {outcome}" in result.stdout
    result = run("verify", tiny_artifact, "--json")
    assert result.exit_code == (0 if passed else 1)
    assert json.loads(result.stdout)["parity"] == figures


def test_artifact_without_a_record(tiny_artifact: Path) -> None:
    result = run("verify", tiny_artifact)
    assert (result.exit_code, result.stdout) == (2, "")
    way_out = "build the artifact with 'verify.parity: true' and without --lean"
    assert result.stderr == f"error: {tiny_artifact}/parity.safetensors is missing: {way_out}\n"
    lines = run("inspect", tiny_artifact).stdout.splitlines()
    (line,) = (line for line in lines if line.startswith("parity record: "))
    assert line.endswith("build with 'verify.parity: true' and without --lean to have one")
    assert not json.loads(run("inspect", tiny_artifact, "--json").stdout)["has_parity_record"]


def test_inspect_shows_every_linear(tiny_artifact: Path) -> None:
    result = run("inspect", tiny_artifact)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "q_proj", "96x48", "3", "16", "2"] in [row[:6] for row in rows]
    assert ["1", "q_proj"] in [row[:2] for row in rows]
    assert "…" not in result.stdout
    assert "bits per weight" in result.stdout
    content = json.loads(run("inspect", tiny_artifact, "--json").stdout)
    assert content["kind"] == "artifact"
    assert len(content["linears"]) == 15


def test_inspect_shows_a_checkpoint(tiny_artifact: Path) -> None:
    checkpoint = tiny_artifact.with_name("checkpoint")
    result = run("inspect", checkpoint)
    assert result.exit_code == 0
    assert "model.embed_tokens.weight" in result.stdout
    content = json.loads(run("inspect", checkpoint, "--json").stdout)
    assert content["kind"] == "checkpoint"


def test_passes_and_schema() -> None:
    result = run("passes")
    assert result.exit_code == 0
    assert "quantize_gptq\n  Quantize with GPTQ" in result.stdout
    assert '  group_size = "auto"\n      columns that share a scale' in result.stdout
    listed = json.loads(run("passes", "--json").stdout)
    assert "eora" in [one["name"] for one in listed]
    schema = json.loads(run("schema").stdout)
    assert "calibration" in schema["properties"]


# --- as a process: what only a real one can show --------------------------------------------------


def process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eoracc.compiler.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_process_exits_with_code_and_pure_streams(tmp_path: Path) -> None:
    done = process("inspect", tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: there is no such file or folder\n"
    done = process("inspect", tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stderr) == (2, "")
    assert "error" in json.loads(done.stdout)


def test_process_says_what_it_waits_for_and_repairs(tmp_path: Path) -> None:
    (tmp_path / "artifact" / ".change.partial").mkdir(parents=True)
    with lock_folder(tmp_path / "artifact", exclusive=True):
        done = process("--wait", "2", "verify", tmp_path / "artifact")
    assert done.returncode == 2
    waits, error = done.stderr.splitlines()
    assert waits.startswith(f"{tmp_path / 'artifact'}: waiting for at most 2 s for process ")
    assert error.startswith(f"error: {tmp_path / 'artifact'}: is locked by process {os.getpid()}")
    done = process("--wait", "0", "verify", tmp_path / "artifact")
    assert "removed the beginnings of a change" in done.stderr.splitlines()[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
def test_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "eoracc.compiler.cli", "schema"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr == "error: input or output fails: No space left on device\n"


WAITING = """
import sys, time, types, warnings

def build(*_, **__):
    warnings.warn("for developers")
    print("ready", flush=True)
    time.sleep(60)

sys.modules["eoracc.compiler.driver"] = types.SimpleNamespace(build=build)
from eoracc.compiler.cli import main
main(prog_name="eoracc")
"""
"""Runs the command line with a build that warns and waits."""


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
    ids=["SIGTERM", "SIGINT"],
)
def test_signals_end_a_build_that_resumes(
    model_yaml: Path, number: signal.Signals, code: int, word: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, "build", str(model_yaml)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (
        code,
        f"error: {word}: run the same command again to go on from what has been kept\n",
    )


@pytest.mark.parametrize("command", ["schema", "inspect"])
def test_closed_pipe_is_quiet(tiny_artifact: Path, command: str) -> None:
    arguments = [command] if command == "schema" else [command, str(tiny_artifact)]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "eoracc.compiler.cli", *arguments],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["passes"], ["run", "nowhere", "x"]])
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from eoracc.compiler.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'mobius', 'onnxruntime'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
