from __future__ import annotations

import logging
import time

import pytest

from eoracc.runtime.folder_watch import FolderChange
from eoracc.runtime.server.served.folder_monitor import FolderMonitor
from tests.runtime.server.fake import FakeFolder


def test_each_change_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("eoracc.runtime.server.served.folder_monitor._INTERVAL_S", 0.005)
    folder = FakeFolder()
    monitor = FolderMonitor(folder)
    with caplog.at_level(logging.INFO, logger="eoracc.server"):
        for change in (FolderChange("is gone\x1b[2J"), None):
            folder.change = change
            end = time.monotonic() + 5
            while monitor.changed is (change is None) and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(0.05)  # several more looks
    monitor.close()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == [
        "the artifact's folder is gone\\x1b[2J",
        "the artifact's folder holds again what was loaded from it",
    ]
