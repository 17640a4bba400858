"""``eoracc serve`` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

__all__ = ["KEY", "ServerProcess"]

KEY = "sesame"
_READY_S = 120
_END_S = 30


class ServerProcess:
    """A server on a free port; it is stopped with the context.

    Attributes:
      url: of its API, with ``/v1``.
      lines: of its standard error, so far.
    """

    def __init__(self, artifact: Path, *options: str, descriptors: int | None = None) -> None:
        """Prepare to serve ``artifact``, with a limit on the process's open files."""
        command = [sys.executable, "-m", "eoracc.compiler.cli", "serve", str(artifact)]
        command += ["--port", "0", "--threads", "1", "--log-format", "json", *options]
        if descriptors is not None:
            command = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *command]
        self._process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "EORACC_API_KEY": KEY},
        )
        self.lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._reader.start()
        if not self._ready.wait(_READY_S) or not self.url:
            self._process.kill()
            self._process.wait()
            self._close()
            raise AssertionError("".join(self.lines))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close()

    @property
    def root(self) -> str:
        """The URL without ``/v1``."""
        return self.url.removesuffix("/v1")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self._process.wait(_END_S)
        self._reader.join(_END_S)
        return code

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its requests in the log."""
        return [line for line in self.all_log if "route" in line]

    @property
    def all_log(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in self.lines]

    def _read(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        for line in stream:
            self.lines.append(line)
            if match := re.search(r'serving .* at (http://[^\s"]+)', line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()

    def _close(self) -> None:
        self._reader.join(_END_S)
        if self._process.stderr is not None:
            self._process.stderr.close()
