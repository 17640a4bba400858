"""Limits of connections, and the number that the process's file descriptors allow."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path

from eoracc.errors import BackendError

__all__ = ["ConnectionLimits", "fit_to_descriptors"]

_RESERVED_DESCRIPTORS = 24
"""For connections that are being closed, and files of adapters."""

_LEAST_CONNECTIONS = 8


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """How many connections may be open, and how long each may keep the server waiting.

    Attributes:
      max_connections: open at a time.
      max_per_address: open at a time from one client address; None for any number.
      header_timeout_s: seconds for the first byte of a connection, and for the line and the headers
        of a request from their first byte to the last.
      body_timeout_s: seconds for the body of a request, up to its last byte.
      keep_alive_s: seconds between two requests of a connection.
      send_timeout_s: seconds for a client to take what the server has sent; large answers get more,
        see :data:`~eoracc.runtime.server.connections.connection.LEAST_BYTES_PER_S`.
    """

    max_connections: int = 1000
    max_per_address: int | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: int = 15
    send_timeout_s: float = 30.0

    @property
    def refused_at_once(self) -> int:
        """Refused connections that may be open at a time, on top of ``max_connections``."""
        return max(_LEAST_CONNECTIONS, self.max_connections // 4)

    @property
    def descriptors(self) -> int:
        """File descriptors that connections may need."""
        return self.max_connections + self.refused_at_once + _RESERVED_DESCRIPTORS


def fit_to_descriptors(limits: ConnectionLimits) -> ConnectionLimits:
    """Raise the process's limit of file descriptors as far as needed, and as far as it may.

    Returns:
      ``limits``, with no more connections than the process has file descriptors for.

    Raises:
      BackendError: there are too few file descriptors for a server.
    """
    others = _open_descriptors()
    needed = others + limits.descriptors
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fitted = limits
    while others + fitted.descriptors > soft and fitted.max_connections > _LEAST_CONNECTIONS:
        fitted = replace(fitted, max_connections=fitted.max_connections - 1)
    if others + fitted.descriptors > soft:
        raise BackendError(
            f"the process may open {soft} files, which leaves none for connections: raise the "
            f"limit with 'ulimit -n {others + fitted.descriptors}' or more"
        )
    return fitted


def _open_descriptors() -> int:
    for folder in (Path("/proc/self/fd"), Path("/dev/fd")):
        if folder.is_dir():
            return sum(1 for _ in folder.iterdir())
    return 0
