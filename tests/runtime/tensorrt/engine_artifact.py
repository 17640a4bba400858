"""A tiny artifact with engines of the stand-in, and an oracle of their results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.runtime.adapters.adapter import Adapter
from eoracc.runtime.adapters.store import add_adapter
from eoracc.runtime.artifact.manifest import read_manifest
from tests.runtime.tensorrt.stand_in import open_graph, write_engines
from tests.tiny_artifact import reseal, tiny_factors, tiny_slots, write_tiny_artifact

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from eoracc.compiler.targets.tensorrt.explicit_attention import CacheLayout
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["CONTEXT", "RANKS", "Oracle", "tiny_adapter", "write_engine_artifact"]

CONTEXT = 128
RANKS = {"math": 4, "prose": 9}


def write_engine_artifact(
    work: Path,
    libcuda: Path,
    *,
    cache: CacheLayout = "concat",
    adapter_type: Any = "float16",  # noqa: ANN401 - a literal of the lowering
    dtype: Any = "float16",  # noqa: ANN401 - likewise
    narrow: bool = False,
    adapters: bool = True,
    **ranges: Any,  # noqa: ANN401 - of write_engines
) -> Path:
    """The artifact of :func:`write_tiny_artifact` with a folder ``tensorrt_rtx``, and adapters.

    Args:
      work: an existing folder.
      libcuda: the stand-in of the driver.
      cache: of the engines.
      adapter_type: of the engines: ``dtype`` or ``none``.
      dtype: of the engines: ``float16`` or ``bfloat16``.
      narrow: keep cache and factors in ``dtype``. Otherwise they are in float32 as all that is
        computed, so that nothing but the order of sums tells one way of calling the model from
        another.
      adapters: add them.
      **ranges: of the profiles, see :func:`write_engines`.
    """
    from eoracc.compiler.frontend import load as frontend
    from eoracc.compiler.targets.tensorrt.lower_rtx import lower
    from tests.tiny_artifact import _compress

    folder = write_tiny_artifact(work, adapter_type="int8")
    source = frontend.load(str(work / "checkpoint"), work=work).model
    _compress(source)
    lowered = lower(
        source,
        dtype=dtype,
        adapter_type=adapter_type,
        cache=cache,
        capacity=CONTEXT if cache == "in_place" else None,
    )
    usual: dict[str, Any] = {
        "batch": (1, 1, 4),
        "sequence": (1, 8, 16),
        "context_length": CONTEXT,
        "logits": (1, 1, 6),
        "rank": (0, 8, 16),
    }
    target = folder / "tensorrt_rtx"
    write_engines(target, lowered, libcuda, dtype=dtype, narrow=narrow, **(usual | ranges))
    reseal(folder)
    for name in RANKS if adapters else ():
        factors = tiny_adapter(folder, name)
        add_adapter(folder, Adapter(name, factors, read_manifest(folder).digest))
    return folder


def tiny_adapter(folder: Path, name: str) -> dict[str, LowRank]:
    """Random factors, as large as the weights; ``prose`` has none for attention."""
    factors = tiny_factors(tiny_slots(folder), rank=RANKS[name], seed=len(name), size=1.0)
    if name == "prose":
        factors = {linear: one for linear, one in factors.items() if "mlp" in linear}
    return factors


class Oracle:
    """What the engines compute, run on whole texts: no cache, no padding, no batch."""

    def __init__(self, folder: Path) -> None:
        self._session = open_graph(str(folder.parent / "twin.onnx"))
        self._inputs = {one.name: one.shape for one in self._session.get_inputs()}

    def logits(
        self, tokens: list[int], factors: Mapping[str, LowRank] | None = None
    ) -> NDArray[np.float32]:
        """``[len(tokens), V]``."""
        count = len(tokens)
        feeds: dict[str, Any] = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count)[None],
            "logits_positions": np.arange(count)[None],
            "write_indices": np.zeros(1, np.int64),
        }
        for name, shape in self._inputs.items():
            if name.startswith("past_key_values."):
                columns = shape[2] if isinstance(shape[2], int) else 0
                feeds[name] = np.zeros((1, shape[1], columns, shape[3]), np.float32)
            elif name.endswith((".lora_a", ".lora_b")):
                own = (factors or {}).get(name[: -len(".lora_a")])
                if own is None:
                    feeds[name] = np.zeros([16 if size == "rank" else size for size in shape])
                else:
                    feeds[name] = own.down() if name.endswith("a") else own.up()
                    extra = 16 - own.rank
                    padding = ((0, extra), (0, 0)) if name.endswith("a") else ((0, 0), (0, extra))
                    feeds[name] = np.pad(feeds[name], padding)
                feeds[name] = feeds[name].astype(np.float32)
        feeds = {name: array for name, array in feeds.items() if name in self._inputs}
        logits: NDArray[np.float32] = self._session.run(["logits"], feeds)[0][0]
        return logits

    def greedy(
        self, prompt: list[int], count: int, factors: Mapping[str, LowRank] | None = None
    ) -> list[int]:
        """What greedy decoding makes, every token from the whole text before it."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens, factors)[-1].argmax()))
        return tokens[len(prompt) :]
