"""Tell, while the server runs, that the artifact's folder has changed."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

from eoracc.printable import printable
from eoracc.runtime.folder_watch import FolderChange

__all__ = ["FolderMonitor", "SupportsFolderWatch"]

_INTERVAL_S = 2.0

_log = logging.getLogger("eoracc.server")


class SupportsFolderWatch(Protocol):
    """Watches a folder, as :class:`eoracc.runtime.folder_watch.FolderWatch` does."""

    def check(self) -> FolderChange | None:
        """Look at the folder; None while it holds what was loaded."""

    def explain_missing(self, adapter: str, /) -> str | None:
        """A sentence about an adapter that only the changed folder has; None for other names."""


class FolderMonitor:
    """Looks at the folder every few seconds, in a thread of its own, and logs each change once.

    The event loop never waits for a slow file system.
    """

    def __init__(self, watch: SupportsFolderWatch) -> None:
        """Start the thread; :meth:`close` ends it."""
        self._watch = watch
        self._change: FolderChange | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="eoracc-folder", daemon=True)
        self._thread.start()

    @property
    def changed(self) -> bool:
        """Whether the folder no longer holds what was loaded."""
        return self._change is not None

    def close(self) -> None:
        """End the thread, or leave it behind where it waits for a file system."""
        self._closed.set()
        self._thread.join(_INTERVAL_S)

    def _work(self) -> None:
        while not self._closed.wait(_INTERVAL_S):
            change = self._watch.check()
            if change == self._change:
                continue
            self._change = change
            if change is None:
                _log.info("the artifact's folder holds again what was loaded from it")
            else:
                # One text for each change: repeated ones may be left out of the log.
                text = (
                    f"the artifact's folder {printable(change.text)}: answers still come from what "
                    "was loaded: restart the server to serve the folder"
                )
                _log.warning(text)
