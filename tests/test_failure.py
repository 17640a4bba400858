from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from eoracc.errors import ArtifactError, ConfigError, GateError
from eoracc.failure import TerminatedError, end_process, explain, hide_thread_traces

if TYPE_CHECKING:
    from pathlib import Path


class Unreadable(Exception):  # noqa: N818 - as another package may name its own
    @override
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "code", "beginning"),
    [
        (ArtifactError("a: b"), 2, "a: b"),
        (GateError("parity failed"), 1, "parity failed"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TerminatedError(), 143, "terminated"),
        (MemoryError(), 2, "this machine has not enough memory: free some"),
        (MemoryError("64 GiB"), 2, "this machine has not enough memory (64 GiB): free some"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "input or output fails: No space"),
        (PermissionError(errno.EACCES, "denied", "a\nb"), 2, "a\\nb: denied"),
        (FileNotFoundError(errno.ENOENT, "gone", b"\xff"), 2, "\\udcff: gone"),
        (OSError("of another package"), 3, "internal error: OSError: of another package; set "),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 3, "internal error: UnicodeDecode"),
        (KeyError("x"), 3, "internal error: KeyError: 'x'; set EORACC_DEBUG=1"),
        (ValueError("embedded null byte"), 2, "a path holds a null character"),
        (ValueError(), 3, "internal error: ValueError; set EORACC_DEBUG=1"),
        (Unreadable(), 3, f"internal error: {__name__}.Unreadable: its text cannot be read; set"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_every_exception_has_one_sentence(error: BaseException, code: int, beginning: str) -> None:
    failure = explain(error)
    (sentence,) = failure.sentences
    assert failure.exit_code == code
    assert sentence.startswith(beginning)


def test_what_strangers_wrote_is_bounded_and_printable() -> None:
    for error in (ValueError("\x1b[2J\n" * 10_000), ArtifactError("\x1b[2J\n" * 10_000)):
        (sentence,) = explain(error).sentences
        assert sentence.isprintable()
        assert len(sentence) < 20_000
    many = explain(ConfigError(*(f"mistake {i}" for i in range(60))))
    assert many.sentences[49:] == ("mistake 49", "and 10 more mistakes")


def test_the_message_of_a_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught:
        tmp_path.read_bytes()
    assert explain(caught.value).sentences == (f"{tmp_path}: Is a directory",)


def test_a_process_ends_with_its_sentences(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EORACC_DEBUG", raising=False)
    assert end_process(ConfigError("a", "b")) == 2
    assert capsys.readouterr().err == "error: a\nerror: b\n"
    monkeypatch.setenv("EORACC_DEBUG", "1")
    assert end_process(ValueError("\x1b"), prefix="") == 3
    said = capsys.readouterr().err
    assert said.startswith("ValueError: \\x1b\ninternal error: ValueError: \\x1b; ")


def test_a_thread_ends_with_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ValueError("bug")

    monkeypatch.delenv("EORACC_DEBUG", raising=False)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    hide_thread_traces()
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert said.startswith("error: in a thread: internal error: ValueError: bug; ")
    assert said.count("\n") == 1
