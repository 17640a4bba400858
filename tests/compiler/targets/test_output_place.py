from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from eoracc.compiler.targets.artifact import ArtifactWriter
from eoracc.compiler.targets.output_place import check_output, refuse_full_disk
from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.folder_change import PENDING, STAGED
from eoracc.runtime.artifact.folder_exchange import upcoming_path
from eoracc.runtime.artifact.signature import SIGNATURE_FILE

ROOT_USER = os.geteuid() == 0


def write(output: Path) -> Path:
    with ArtifactWriter(output) as writer:
        writer.write_json("genai_config.json", {})
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    return output


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file is no folder: choose another 'output'"):
        check_output(tmp_path / "file" / "artifact")


@pytest.mark.skipif(ROOT_USER, reason="root may write anywhere")
def test_output_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="cannot be written to"):
        check_output(tmp_path / "artifact")


@pytest.mark.parametrize("length", [300, 255, 238])
def test_name_that_no_disk_takes(tmp_path: Path, length: int) -> None:
    with pytest.raises(ArtifactError, match="File name too long: choose another 'output'"):
        check_output(tmp_path / ("a" * length))


def test_longest_name(tmp_path: Path) -> None:
    write(tmp_path / ("a" * 237))
    with pytest.raises(ArtifactError, match="File name too long"):
        check_output(tmp_path / ("é" * 119))
    with pytest.raises(ArtifactError, match="File name too long"):
        check_output(tmp_path / ("a" * 300) / "artifact")


@pytest.mark.parametrize("name", [".", "..", "there/.."])
def test_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="has no name that a folder could be made under"):
        check_output(Path(name))
    with pytest.raises(ArtifactError, match="has no name"):
        check_output(Path("/"), force=True)


def test_name_of_unfinished_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a name of unfinished artifacts, which builds remo"):
        check_output(tmp_path / ".out.partial-abcdefgh")


def test_current_folder_that_is_gone(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from eoracc.compiler.targets.output_place import check_output\n"
        "os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])\n"
        "try: check_output(Path('out'))\n"
        "except Exception as error: print(error)\n"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "gone")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    expected = "out: the current folder has been removed: change to another folder"
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("kind", ["file", "empty", "stranger", "stranger's manifest"])
def test_force_replaces_nothing_but_an_artifact(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.touch()
    else:
        output.mkdir()
    if kind.startswith("stranger"):
        (output / "precious.txt").touch()
    if kind == "stranger's manifest":
        (output / "manifest.json").write_text('{"format": "another program"}')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArtifactError, match="is no eoracc artifact, so --force does not replace"):
        check_output(output, force=True)
    with pytest.raises(ArtifactError, match="exists: choose another 'output', or replace it"):
        check_output(output)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["notes.txt", "model/weights", "adapters/.hidden", "link"])
def test_force_keeps_what_somebody_else_put_there(tmp_path: Path, name: str) -> None:
    output = write(tmp_path / "out")
    (output / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (output / name).symlink_to(tmp_path / "nowhere")
    else:
        (output / name).touch()
    with pytest.raises(ArtifactError, match=f"out/{name}: is no part of the artifact, so --force"):
        check_output(output, force=True)
    with pytest.raises(ArtifactError, match="is no part"):
        ArtifactWriter(output, force=True)
    assert os.path.lexists(output / name)


def test_signed_artifact_is_replaced(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    (output / SIGNATURE_FILE).write_bytes(b"signature")
    check_output(output, force=True)
    with ArtifactWriter(output, force=True) as writer:
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    assert [path.name for path in output.iterdir()] == ["manifest.json"]


def test_stranger_that_comes_during_the_build_is_kept(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    with ArtifactWriter(output, force=True) as writer:
        (output / "notes.txt").touch()
        with pytest.raises(ArtifactError, match=r"notes\.txt: is no part of the artifact"):
            writer.commit(source={"model": "m"}, config={}, parity={}, packages={})
    assert (output / "notes.txt").exists()


def test_artifact_whose_change_was_interrupted_is_replaced(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    (output / PENDING / "files" / "adapters").mkdir(parents=True)
    (output / PENDING / "files" / "adapters" / "new.json").write_text("{}")
    manifest = json.loads((output / "manifest.json").read_bytes())
    (output / PENDING / "files" / "manifest.json").write_text(json.dumps(manifest))
    (output / PENDING / "removed.json").write_text('["adapters/new.json"]')
    (output / STAGED).mkdir()
    check_output(output, force=True)
    assert sorted(path.name for path in output.iterdir()) == ["genai_config.json", "manifest.json"]


def test_exchange_that_was_interrupted_is_finished(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    upcoming_path(output).mkdir()
    output.rename(upcoming_path(output) / "out")
    with pytest.raises(ArtifactError, match="out: exists"):
        check_output(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dangling", [False, True])
def test_link_is_not_replaced(tmp_path: Path, dangling: bool) -> None:
    if not dangling:
        write(tmp_path / "artifact")
    (tmp_path / "link").symlink_to(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="link: is a link, so --force does not replace it: giv"):
        check_output(tmp_path / "link", force=True)
    with pytest.raises(ArtifactError, match="link: exists"):
        check_output(tmp_path / "link")
    with pytest.raises(ArtifactError, match="link: is a link"):
        check_output(Path(f"{tmp_path}/link/"), force=True)


def test_parent_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    write(tmp_path / "link" / "out")
    assert (tmp_path / "home" / "out" / "manifest.json").exists()


def test_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    with pytest.raises(ArtifactError, match="out: is a mount point: choose a folder in it"):
        check_output(output, force=True)


@pytest.mark.skipif(ROOT_USER, reason="root may write anywhere")
def test_artifact_that_may_not_be_written(tmp_path: Path) -> None:
    output = write(tmp_path / "out")
    output.chmod(0o500)
    with pytest.raises(ArtifactError, match="may not be written to, so --force does not replace"):
        check_output(output, force=True)


def test_lock_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write(tmp_path / "out")

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ArtifactError, match="out: cannot be locked for a change: No locks"):
        check_output(output, force=True)
    write(tmp_path / "new")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (OSError(errno.ENOSPC, ""), "the disk is full: free some space or choose"),
        (OSError(errno.EDQUOT, ""), "the disk is full: free some space or choose"),
        (OSError(errno.EFBIG, ""), "a file would be larger than this disk or process may have"),
        (SafetensorError("I/O error: (os error 28)"), "the disk is full"),
    ],
)
def test_what_a_full_disk_says(tmp_path: Path, error: Exception, problem: str) -> None:
    with pytest.raises(ArtifactError, match=problem):
        refuse_full_disk(tmp_path, error)
    refuse_full_disk(tmp_path, OSError(errno.EIO, ""))
    refuse_full_disk(tmp_path, SafetensorError("I/O error: (os error 5)"))
