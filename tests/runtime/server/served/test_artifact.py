"""A whole artifact behind the application: extreme factors, and a folder that changes."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime import RequestError, load
from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from eoracc.runtime.server.app import create_app
from eoracc.runtime.server.options import ServerOptions
from eoracc.runtime.server.served.artifact import open_artifact
from eoracc.runtime.server.service import Service
from tests.runtime.folder_changes import build_again, copy_over
from tests.tiny_artifact import tiny_factors, tiny_slots

COMPLETIONS = "/v1/completions"
HUGE = 1e37
"""Finite in float32, and beyond its range once it is a hundred times as large."""


@asynccontextmanager
async def serve(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(
        open_artifact(folder, rows=2, threads=1), ServerOptions(), model_name="backbone"
    )
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    service.close()


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:  # noqa: ANN401
    fields = {"prompt": "b c", "max_tokens": 6, "temperature": 0, "ignore_eos": True} | fields
    return await client.post(COMPLETIONS, json=fields)


def scaled(factors: Mapping[str, LowRank], *, a: float = 1, b: float = 1) -> dict[str, LowRank]:
    scaled_factors = {}
    for name, own in factors.items():
        assert own.lora_a_scale is not None
        assert own.lora_b_scale is not None
        scaled_factors[name] = LowRank(
            lora_a=own.lora_a,
            lora_b=own.lora_b,
            lora_a_scale=np.full_like(own.lora_a_scale, a) if a != 1 else own.lora_a_scale,
            lora_b_scale=np.full_like(own.lora_b_scale, b) if b != 1 else own.lora_b_scale,
        )
    return scaled_factors


@pytest.fixture(scope="module")
def extreme(adapted_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with adapters whose scales are near the end of float32."""
    folder = shutil.copytree(adapted_artifact, tmp_path_factory.mktemp("extreme") / "artifact")
    slots, digest = tiny_slots(folder), read_manifest(folder).digest
    factors = tiny_factors(slots, rank=4, seed=3)
    for name, own in (("a", scaled(factors, a=HUGE)), ("b", scaled(factors, b=HUGE))):
        add_adapter(folder, Adapter(name, own, digest))
    return folder


EXTREMES: tuple[str | dict[str, float], ...] = (
    "a",
    "b",
    {"a": 0.7},
    {"b": -1},
    {"a": 1000},
    {"a": -1000, "math": 1},
    {"b": 1000, "math": 1},
    {"b": 1e4, "a": 1e4},
)


def test_factors_beyond_float32_are_the_request_s_fault(extreme: Path) -> None:
    async def test() -> None:
        async with serve(extreme) as client:
            before = (await ask(client)).json()["choices"]
            for adapter in EXTREMES:
                named = isinstance(adapter, str)
                answer = await ask(client, **{"model" if named else "adapters": adapter})
                assert answer.status_code == 400, adapter
                error = answer.json()["error"]
                assert error["param"] in {"adapter", "adapters"}
                assert "beyond the range of float32" in error["message"]
            tiny = await ask(client, adapters={"a": 1e-300, "math": 1})
            assert tiny.json()["choices"] == (await ask(client, model="math")).json()["choices"]
            assert (await ask(client)).json()["choices"] == before

    asyncio.run(test())


def test_scores_are_never_nan(extreme: Path) -> None:
    model = load(extreme, threads=1)
    for adapter in EXTREMES:
        with pytest.raises(RequestError, match="beyond the range of float32"):
            model.score("b c d", adapter=adapter)
    assert np.isfinite(model.score("b c d", adapter="math").perplexity)


@pytest.mark.parametrize("change", [build_again, copy_over])
def test_another_build_under_a_server(
    adapted_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    folder = shutil.copytree(adapted_artifact, tmp_path / "artifact")
    monkeypatch.setattr("eoracc.runtime.server.served.folder_monitor._INTERVAL_S", 0.02)
    sums = [{"math": 0.7}, {"math": 0.5, "prose": 0.5}]

    async def test() -> None:
        async with serve(adapted_artifact) as client:
            wanted = [(await ask(client, adapters=weights)).json()["choices"] for weights in sums]
        async with serve(folder) as client:
            change(folder)
            found = [(await ask(client, adapters=weights)).json()["choices"] for weights in sums]
            assert found == wanted
            refused = await ask(client, model="poetry")
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                404,
                "artifact_changed",
            )
            for _ in range(200):
                health = (await client.get("/health")).json()
                if health["artifact"] == "changed":
                    break
                await asyncio.sleep(0.02)
            assert health == {"status": "ready", "artifact": "changed"}

    asyncio.run(test())
