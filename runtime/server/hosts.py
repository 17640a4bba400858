"""The host names that a server answers to.

A page of any web site can have its own name resolve to 127.0.0.1 after it has loaded (DNS
rebinding). Its requests to a local server are then of its own origin, so that the browser neither
asks for permission nor hides the answers; only the ``Host`` header gives them away.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from http import HTTPStatus

from eoracc.errors import ApiError
from eoracc.printable import printable

__all__ = ["ANY_HOST", "HostRule", "is_loopback"]

ANY_HOST = "*"
"""An allowed host that stands for all."""

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.%]+\]|[^\s:/@\[\]]+)(:\d{0,5})?", re.IGNORECASE)
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", re.IGNORECASE)
_SHOWN_CHARS = 64


class HostRule:
    """Accepts loopback names and addresses, the address that the server listens on, and others.

    Where the server listens on an address that other machines reach, and no name is listed, every
    host is accepted: the server cannot know its names.
    """

    def __init__(self, address: str, allowed: Sequence[str] = ()) -> None:
        """Set up the rule.

        Args:
          address: that the server listens on.
          allowed: further names or addresses; :data:`ANY_HOST` for all.

        Raises:
          ApiError: one of them is neither a name nor an address.
        """
        for name in allowed:
            if name != ANY_HOST and not _NAME.fullmatch(name) and not _is_address(name):
                raise ApiError(
                    f"--allowed-host '{printable(name, _SHOWN_CHARS)}': is neither a host name nor "
                    "an address: give it without scheme and port"
                )
        self._any = ANY_HOST in allowed or not (allowed or is_loopback(address))
        self._names = frozenset(map(_normal, (address, *allowed)))

    def check(self, hosts: Collection[str]) -> None:
        """Check the ``Host`` headers of a request, of which there should be one.

        Raises:
          ApiError: 403, the host is not accepted.
        """
        if self._any or (hosts and all(map(self._accepts, hosts))):
            return
        shown = printable(", ".join(hosts), _SHOWN_CHARS) if hosts else "none"
        raise ApiError(
            f"the header Host names no host of this server ({shown}): ask for localhost, or start "
            "the server with --allowed-host",
            status=HTTPStatus.FORBIDDEN,
            code="host_not_allowed",
        )

    def _accepts(self, host: str) -> bool:
        parts = _HOST.fullmatch(host)
        if parts is None:
            return False
        name = _normal(parts["name"])
        return name in self._names or is_loopback(name)


def is_loopback(name: str) -> bool:
    """Whether a name or address always stands for this machine (RFC 6761, section 6.3)."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _normal(name: str) -> str:
    """One form of names that are the same."""
    name = name.lower().removeprefix("[").removesuffix("]").removesuffix(".")
    return ipaddress.ip_address(name).compressed if _is_address(name) else name
