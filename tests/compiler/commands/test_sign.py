"""``eoracc sign``, and what the other commands make of the signature."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, describe_file, read_manifest
from eoracc.runtime.artifact.signature import SIGNATURE_FILE, make_key
from eoracc.runtime.model import load
from tests.tiny_artifact import tiny_factors, tiny_slots, write_tiny_artifact

if TYPE_CHECKING:
    from collections.abc import Sequence


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with an adapter, signed by ``key.pem`` beside it."""
    work = tmp_path_factory.mktemp("signed")
    folder = write_tiny_artifact(work, adapter_type="int8")
    factors = tiny_factors(tiny_slots(folder), rank=2, seed=0)
    add_adapter(folder, Adapter("math", factors, read_manifest(folder).digest))
    make_key(work / "other.pem")
    result = run("sign", folder, "--key", work / "key.pem", "--new-key", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "signature": str(folder / SIGNATURE_FILE),
        "manifest_sha256": describe_file(folder / MANIFEST_FILE).sha256,
        "public_key": str(work / "key.pem.pub"),
    }
    return folder


@pytest.fixture
def artifact(signed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed, tmp_path / "artifact"))


def test_keys_stay_outside_and_are_files(artifact: Path, tmp_path: Path) -> None:
    listed = sorted(artifact.rglob("*"))
    for key, problem in (
        (artifact / "key.pem", "lies in the artifact"),
        (".", "is a folder: name a file"),
    ):
        result = run("sign", artifact, "--key", key, "--new-key")
        assert (result.exit_code, problem in result.stderr) == (2, True)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    result = run("run", artifact, "a", "--public-key", pipe)
    assert (result.exit_code, result.stderr) == (
        2,
        f"error: {pipe}: is no file: give the file of a key\n",
    )
    result = run("adapter", "export", artifact, "math", "--to", artifact / "peft")
    assert (result.exit_code, "lies in the artifact" in result.stderr) == (2, True)
    assert sorted(artifact.rglob("*")) == listed


def test_threads_and_times_have_bounds(artifact: Path) -> None:
    result = run("bench", artifact, "--threads", "99999999999")
    assert (result.exit_code, "must be from 1 to 1,024" in result.stderr) == (2, True)
    result = run("serve", artifact, "--queue-timeout", "nan")
    assert (result.exit_code, "not a number of seconds" in result.stderr) == (2, True)


def commands(artifact: Path, *, to: Path) -> Sequence[Sequence[str | Path]]:
    """Every command that opens an artifact, but for ``serve``, which opens it as ``run`` does."""
    few = ("--prompt-tokens", "20", "--new-tokens", "12", "--repeats", "1", "--threads", "1")
    return (
        ("run", artifact, "abc", "--no-chat", "--max-new-tokens", "2"),
        ("inspect", artifact),
        ("bench", artifact, *few),
        ("adapter", "list", artifact),
        ("adapter", "export", artifact, "math", "--to", to / "peft"),
        ("adapter", "import", artifact, to / "peft", "--name", "again"),
        ("adapter", "remove", artifact, "math"),
    )


def test_every_command_takes_the_right_key_and_digest(signed: Path, tmp_path: Path) -> None:
    key = signed.parent / "key.pem.pub"
    digest = describe_file(signed / MANIFEST_FILE).sha256
    for command in commands(signed, to=tmp_path):
        copy = Path(shutil.copytree(signed, tmp_path / "copy"))
        own = [copy if argument == signed else argument for argument in command]
        result = run(*own, "--public-key", key, "--digest", digest)
        assert result.exit_code == 0, result.output
        shutil.rmtree(copy)


@pytest.mark.parametrize("problem", ["other key", "no signature", "changed", "other digest"])
def test_every_command_refuses_another_artifact_before_it_opens_anything(
    artifact: Path, signed: Path, tmp_path: Path, problem: str
) -> None:
    options: list[str | Path] = ["--public-key", signed.parent / "key.pem.pub"]
    expected = "is no signature of its manifest.json"
    if problem == "other key":
        options = ["--public-key", signed.parent / "other.pem.pub"]
    elif problem == "no signature":
        (artifact / SIGNATURE_FILE).unlink()
        expected = "is not signed, it has no manifest.json.sig"
    elif problem == "changed":
        content = (artifact / MANIFEST_FILE).read_bytes()
        (artifact / MANIFEST_FILE).write_bytes(content + b" ")
    else:
        options = ["--digest", "0" * 64]
        expected = "not the digest asked for"
    # Whoever opens one of these before the check reports it.
    for path in artifact.rglob("*"):
        if path.is_file() and path.name not in (MANIFEST_FILE, SIGNATURE_FILE):
            path.write_bytes(b"not opened")
    before = sorted(artifact.rglob("*"))
    more = [
        ("verify", artifact),
        ("serve", artifact, "--port", "0"),
        ("engine", artifact),
        ("adapter", "add", artifact, "--name", "new", "--data", tmp_path / "text"),
    ]
    for command in (*commands(artifact, to=tmp_path), *more):
        result = run(*command, *options)
        assert result.exit_code == 2, (command, result.output)
        assert expected in result.stderr, command
        assert result.stderr.count("\n") == 1
    assert sorted(artifact.rglob("*")) == before


def test_load_of_the_python_api(artifact: Path, signed: Path) -> None:
    key, digest = signed.parent / "key.pem.pub", describe_file(artifact / MANIFEST_FILE).sha256
    load(artifact, threads=1, public_key=str(key), digest=digest)


def test_changed_artifact_loses_its_signature_and_says_so(artifact: Path, signed: Path) -> None:
    result = run("adapter", "remove", artifact, "math")
    assert result.exit_code == 0
    assert "has changed, so its signature was removed: sign it again" in result.stderr
    assert not (artifact / SIGNATURE_FILE).exists()
    key = signed.parent / "key.pem"
    assert "is not signed" in run("inspect", artifact, "--public-key", f"{key}.pub").stderr
    assert run("sign", artifact, "--key", key).exit_code == 0
    assert run("inspect", artifact, "--public-key", f"{key}.pub").exit_code == 0


def test_inspect_tells_digest_and_signature(artifact: Path, signed: Path) -> None:
    key = signed.parent / "key.pem.pub"
    digest = describe_file(artifact / MANIFEST_FILE).sha256
    assert f"manifest.json: sha256 {digest}, with a signature" in run("inspect", artifact).stdout
    checked = run("inspect", artifact, "--public-key", key).stdout
    assert f"sha256 {digest}, signed by the owner of the key" in checked
    found = json.loads(run("inspect", artifact, "--json").stdout)
    assert (found["manifest_sha256"], found["signature"]) == (digest, "unchecked")
    (artifact / SIGNATURE_FILE).unlink()
    assert f"sha256 {digest}, not signed" in run("inspect", artifact).stdout
    (artifact / "report.json").write_text("{}")
    changed = run("inspect", artifact)
    assert changed.exit_code == 2
    assert "report.json: its content is not what manifest.json says" in changed.stderr


def test_checkpoint_has_no_signature(signed: Path) -> None:
    checkpoint = signed.parent / "checkpoint"
    assert run("inspect", checkpoint).exit_code == 0
    result = run("inspect", checkpoint, "--public-key", signed.parent / "key.pem.pub")
    assert result.exit_code == 2
    assert "has no manifest.json, so it is no eoracc artifact" in result.stderr


def test_mistakes_are_one_sentence(artifact: Path, signed: Path, tmp_path: Path) -> None:
    key = signed.parent / "key.pem"
    for command, expected in (
        (("sign", artifact, "--key", tmp_path / "nowhere"), "the key cannot be read"),
        (("sign", artifact, "--key", key, "--new-key"), "key.pem: exists"),
        (("sign", artifact, "--key", f"{key}.pub"), "is no ed25519 private key"),
        (("sign", tmp_path / "no", "--key", key), "there is no such folder"),
        (("inspect", artifact, "--digest", "abc"), "is no sha256"),
        (("inspect", artifact, "--public-key", key), "is no ed25519 public key"),
        (("inspect", artifact, "--public-key", tmp_path / "no"), "the key cannot be read"),
    ):
        result = run(*command)
        assert result.exit_code == 2
        assert expected in result.stderr
        assert result.stderr.count("\n") == 1
    (artifact / SIGNATURE_FILE).unlink()
    (artifact / "model.onnx.data").write_bytes(b"changed")
    result = run("sign", artifact, "--key", tmp_path / "new.pem", "--new-key")
    assert result.exit_code == 2
    assert not (tmp_path / "new.pem").exists()
    assert not (artifact / SIGNATURE_FILE).exists()
