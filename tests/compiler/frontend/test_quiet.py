from __future__ import annotations

import logging
import sys
import warnings

import pytest

from eoracc.compiler.frontend.quiet import quiet


def test_nothing_is_heard(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet():
        warnings.warn("a note", UserWarning, stacklevel=1)
        logging.getLogger("some.library").warning("another")
        print("a bar", file=sys.stderr)
    assert capsys.readouterr().err == ""
    assert caplog.records == []


def test_errors_pass_and_everything_is_heard_again(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        logging.getLogger("some.library").error("kept")
        raise KeyError

    with pytest.raises(KeyError), quiet():
        fail()
    logging.getLogger("some.library").warning("heard")
    print("seen", file=sys.stderr)
    assert [record.message for record in caplog.records] == ["kept", "heard"]
    assert capsys.readouterr().err == "seen\n"
