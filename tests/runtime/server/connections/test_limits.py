from __future__ import annotations

import resource

import pytest

from eoracc.errors import BackendError
from eoracc.runtime.server.connections.limits import ConnectionLimits, fit_to_descriptors


def fitted(
    monkeypatch: pytest.MonkeyPatch, asked: int, *, soft: int, hard: int
) -> tuple[int, int | None]:
    """Connections that are allowed of those asked for, and the new limit of file descriptors."""
    raised: list[int] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: raised.append(limits[0]))
    limits = fit_to_descriptors(ConnectionLimits(max_connections=asked))
    return limits.max_connections, raised[0] if raised else None


@pytest.mark.parametrize("soft", [1 << 20, resource.RLIM_INFINITY])
def test_enough_descriptors_change_nothing(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    assert fitted(monkeypatch, 700, soft=soft, hard=soft) == (700, None)


@pytest.mark.parametrize("hard", [1 << 20, resource.RLIM_INFINITY])
def test_the_limit_is_raised_as_far_as_needed(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    connections, raised = fitted(monkeypatch, 800, soft=256, hard=hard)
    assert connections == 800
    assert raised is not None
    assert 1000 + 24 < raised < 1000 + 24 + 500  # with files of the test process


def test_connections_are_limited_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    connections, raised = fitted(monkeypatch, 10_000, soft=512, hard=1024)
    assert raised == 1024
    assert 300 < connections < 1024 * 4 // 5


def test_too_few_descriptors_for_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"raise the limit with 'ulimit -n \d+'") as caught:
        fitted(monkeypatch, 10, soft=16, hard=36)
    needed = int(str(caught.value).split("ulimit -n ")[1].split("'")[0])
    assert fitted(monkeypatch, 10, soft=16, hard=needed) == (8, needed)
