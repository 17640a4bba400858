from __future__ import annotations

import pytest
from starlette.types import Message

from eoracc.errors import ApiError
from eoracc.runtime.server.hosts import HostRule
from tests.runtime.server.fake import COMPLETIONS, JSON, Server, completion, run

LOCAL = [
    *("localhost", "localhost:8000", "LocalHost.", "a.localhost:1", "127.0.0.1", "127.1.2.3:80"),
    *("[::1]", "[::1]:8000", "[0:0:0:0:0:0:0:1]"),
]
FOREIGN = [
    *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
    *("192.168.1.5", "[fe80::1]", "", "localhost@evil.example", "evil.example/localhost"),
    *("localhost evil.example", "localhost:80:80", "[::1", "2130706433", "0.0.0.0"),  # noqa: S104
]


def accepts(rule: HostRule, *hosts: str) -> bool:
    try:
        rule.check(hosts)
    except ApiError as error:
        return (error.status, error.code) != (403, "host_not_allowed")
    return True


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "127.0.0.5"])
def test_on_loopback_only_local_names(address: str) -> None:
    rule = HostRule(address)
    assert [host for host in LOCAL if not accepts(rule, host)] == []
    assert [host for host in FOREIGN if accepts(rule, host)] == []
    assert not accepts(rule)
    assert not accepts(rule, "localhost", "evil.example")


def test_names_that_are_allowed() -> None:
    rule = HostRule("127.0.0.1", ["Box.example", "10.0.0.7"])
    assert all(accepts(rule, host) for host in ("box.example:443", "10.0.0.7:80", "localhost"))
    assert not accepts(rule, "evil.example")
    assert accepts(HostRule("127.0.0.1", ["*"]), "evil.example")


def test_other_addresses_have_names_that_the_server_cannot_know() -> None:
    assert accepts(HostRule("192.168.1.5"), "any.example")
    rule = HostRule("192.168.1.5", ["box.example"])
    assert all(accepts(rule, host) for host in ("box.example", "192.168.1.5:8000", "localhost"))
    assert not accepts(rule, "evil.example")


@pytest.mark.parametrize("name", ["http://box.example", "box.example:80", "", "a b", "\x1b[2J"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ApiError, match="neither a host name nor an address") as caught:
        HostRule("127.0.0.1", [name])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", [None, "secret"])
def test_foreign_hosts_get_nothing(key: str | None) -> None:
    async def test(server: Server) -> None:
        foreign = JSON | {"Host": "evil.example"}
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/none"):
            answer = await server.client.get(path, headers=foreign)
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "host_not_allowed"
        answer = await server.client.post(COMPLETIONS, content=completion(), headers=foreign)
        assert answer.status_code == 403
        assert not server.engine.generations
        local = JSON | {"Host": "localhost:8000"}
        answer = await server.client.post(COMPLETIONS, content=completion(), headers=local)
        assert answer.status_code == 200

    run(test, hosts=HostRule("127.0.0.1"), api_key=key)


def test_a_probe_in_http_1_0_needs_no_host() -> None:
    async def test(server: Server) -> None:
        for version, expected in (("1.0", 200), ("1.1", 403)):
            statuses: list[int] = []

            async def receive() -> Message:
                return {"type": "http.request", "body": b""}

            async def send(message: Message, statuses: list[int] = statuses) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            request = {"type": "http", "method": "GET", "path": "/health", "query_string": b""}
            await server.app({**request, "http_version": version, "headers": []}, receive, send)
            assert statuses == [expected]

    run(test, hosts=HostRule("127.0.0.1"))
