"""Serving SmolLM2 with adapters to many clients at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from eoracc.runtime import load
from tests.runtime.server.child import KEY, ServerProcess

pytestmark = pytest.mark.real

TEXT = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
ADAPTERS = ("code", "math", "prose")
PROMPTS = (
    "Once upon a time there was a king who",
    "My fellow citizens, the state of our union",
    "def fibonacci(n):",
    "Naïve façade 日本 😀:",
)
REQUESTS, AT_ONCE, TOKENS = 32, 16, 24


@pytest.fixture(scope="module")
def artifact(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 rounded to 4 bits, without calibration, with three random adapters."""
    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.driver import build
    from eoracc.compiler.progress import SilentProgress
    from eoracc.runtime.adapters.adapter import Adapter
    from eoracc.runtime.adapters.store import add_adapter
    from eoracc.runtime.artifact.manifest import read_manifest
    from tests.tiny_artifact import tiny_factors, tiny_slots

    work = tmp_path_factory.mktemp("served")
    config = BuildConfig.model_validate(
        {
            "model": str(smollm2_folder),
            "passes": [{"quantize_rtn": {"bits": 4, "group_size": 64}}],
            "verify": {"text": str(TEXT), "windows": 1, "compare": [], "parity": False},
            "onnxruntime": {"accuracy_level": 4, "adapter_type": "int8"},
            "output": "out",
        }
    )
    folder = build(config, config_dir=work, progress=SilentProgress()).output
    slots, digest = tiny_slots(folder), read_manifest(folder).digest
    for seed, name in enumerate(ADAPTERS):
        factors = tiny_factors(slots, rank=16, seed=seed, size=0.3)
        add_adapter(folder, Adapter(name, factors, digest))
    return folder


def test_many_clients_with_mixed_adapters_get_what_each_would_get_alone(artifact: Path) -> None:
    import openai

    rng = np.random.default_rng(0)
    names = ("out", *ADAPTERS)
    asks = [
        (names[rng.integers(len(names))], PROMPTS[rng.integers(len(PROMPTS))])
        for _ in range(REQUESTS)
    ]

    async def ask_all(url: str) -> list[str]:
        limit = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:

            async def ask(model: str, prompt: str) -> str:
                async with limit:
                    parts = await client.chat.completions.create(
                        model=model,
                        messages=[{"role": "user", "content": prompt}],
                        max_tokens=TOKENS,
                        temperature=0,
                        stream=True,
                    )
                    return "".join([part.choices[0].delta.content or "" async for part in parts])

            return await asyncio.gather(*(ask(*one) for one in asks))

    with ServerProcess(artifact, "--rows", "8") as server:
        answers = asyncio.run(ask_all(server.url))
        server.signal()
        assert server.wait() == 0
        assert [line["status"] for line in server.log] == [200] * REQUESTS

    model = load(artifact, threads=1)
    alone = {
        one: model.generate(
            [{"role": "user", "content": one[1]}],
            TOKENS,
            adapter=None if one[0] == "out" else one[0],
        ).text
        for one in set(asks)
    }
    assert answers == [alone[one] for one in asks]
    assert len(set(alone.values())) > len(PROMPTS), "the adapters change nothing"
