"""What the eager model computes for a call: the inputs of its linears, and the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eoracc.compiler.eager.model import module_rows
from eoracc.compiler.sweep.batch import Float

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from eoracc.compiler.frontend_check.calls import Call

__all__ = ["EagerValues", "run_eager"]


@dataclass(frozen=True, eq=False)
class EagerValues:
    """What the eager model computes for one row of a call.

    Attributes:
      inputs: of linears by their names, ``float32 [tokens, K]``.
      logits: ``float32 [tokens, V]``.
    """

    inputs: Mapping[str, Float]
    logits: Float


def run_eager(
    model: PreTrainedModel,
    call: Call,
    linears: Sequence[str],
    past_shapes: Mapping[str, tuple[int, int]],
) -> list[EagerValues]:
    """Run each row of a call alone, without padding: what the others hold must not matter.

    Args:
      model: from :func:`~eoracc.compiler.eager.model.load_eager`.
      call: the way of calling it.
      linears: names of the linears whose inputs are wanted.
      past_shapes: heads and their size by the name of the graph's input, in the order of blocks,
        keys before values.

    Returns:
      The values of each row.

    Raises:
      ModelError: the model has no module of such a name.
    """
    tokens = call.tokens(model.config.vocab_size)
    past = {name: call.cache(name, shape) for name, shape in past_shapes.items()}
    with _recorded(model, linears) as recorded:
        found = []
        for row, length in enumerate(call.lengths):
            own_past = [cached[row : row + 1] for cached in past.values()] if call.past else []
            logits = _logits(model, tokens[row : row + 1, :length], call.steps, own_past)
            inputs = {name: np.concatenate(parts) for name, parts in recorded.items()}
            recorded.clear()
            found.append(EagerValues(inputs, logits))
    return found


@contextmanager
def _recorded(model: PreTrainedModel, linears: Sequence[str]) -> Iterator[dict[str, list[Float]]]:
    """Collect the inputs of ``linears`` as long as the context lasts."""
    recorded: dict[str, list[Float]] = {}

    def record(name: str, _: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        rows = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
        recorded.setdefault(name, []).append(rows.numpy().copy())

    modules = dict(model.named_modules())
    hooks = [
        module.register_forward_pre_hook(partial(record, name))
        for name in linears
        for module, _ in module_rows(modules, model.config, name)[:1]
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _logits(
    model: PreTrainedModel,
    tokens: NDArray[np.int64],
    steps: Sequence[int],
    past: Sequence[Float],
) -> Float:
    from transformers import DynamicCache

    cache, logits, start = DynamicCache(config=model.config), [], 0
    for block, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(torch.from_numpy(key), torch.from_numpy(value), block)
    before = past[0].shape[2] if past else 0
    with torch.inference_mode():
        for size in steps:
            end = min(start + size, tokens.shape[1])
            output: Any = model(
                input_ids=torch.from_numpy(tokens[:, start:end]),
                attention_mask=torch.ones(1, before + end, dtype=torch.int64),
                position_ids=torch.arange(before + start, before + end)[None],
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits[0].numpy())
            start = end
    return np.concatenate(logits)
