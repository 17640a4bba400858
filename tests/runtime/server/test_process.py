from __future__ import annotations

import socket

import pytest

from eoracc.errors import BackendError
from eoracc.runtime.server.process import listen


def test_connections_notice_that_their_client_is_lost() -> None:
    with listen("127.0.0.1", 0) as listener:
        listener.listen()
        with socket.create_connection(listener.getsockname()):
            connection, _ = listener.accept()
            with connection:
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    limit = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
                    assert limit == 60_000


@pytest.mark.parametrize("host", ["", "no.such.host.invalid", "a" * 70, "203.0.113.1"])
def test_addresses_that_cannot_be_had(host: str) -> None:
    with pytest.raises(BackendError, match="choose another --host or --port"):
        listen(host, 0)
