"""The oracle: the transformers model in eager PyTorch, with compressed weights in place of its own.

Parity compares an artifact against this model. It shares nothing with the graph but the checkpoint
and the arrays that compression produced.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eoracc.compiler.errors import ModelError
from eoracc.compiler.projections import PARTS
from eoracc.compiler.quiet import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["load_eager", "positions", "reference_logits"]

def load_eager(
    folder: Path,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint and put ``weights`` in place of its modules' own.

    Args:
      folder: a Hugging Face folder in safetensors form.
      weights: by module name, ``float32 [out, in]``. A name may be a part of a module that the
        family stores fused (``q_proj`` of ``qkv_proj``) or a packed module that it stores in parts.
        Values are read one at a time, so a lazy mapping keeps memory at one model.
      trust_remote_code: let transformers run code that the checkpoint brings.

    Returns:
      The model in float32, evaluation mode, eager attention. A tied head that has a weight of its
      own, or whose embedding has one, is untied.

    Raises:
      ModelError: a name that the model does not have, or a weight of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    model.eval()
    model.requires_grad_(requires_grad=False)
    _untie(model, weights)
    for name in weights:
        weight = np.asarray(weights[name], np.float32)
        row = 0
        for target in _targets(model, name):
            rows = target.shape[0]
            if weight.shape[1:] != target.shape[1:] or row + rows > weight.shape[0]:
                raise _mismatch(name, weight, model)
            with warnings.catch_warnings():
                # A read-only array is only read from.
                warnings.simplefilter("ignore", UserWarning)
                target.copy_(torch.from_numpy(weight[row : row + rows]))
            row += rows
        if row != weight.shape[0]:
            raise _mismatch(name, weight, model)
    return model


def _mismatch(name: str, weight: NDArray[np.float32], model: PreTrainedModel) -> ModelError:
    shapes = [tuple(target.shape) for target in _targets(model, name)]
    return ModelError(
        f"{name}: a weight of shape {weight.shape} does not fit the model's {shapes}"
    )


def _untie(model: PreTrainedModel, weights: Mapping[str, NDArray[np.float32]]) -> None:
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = {id(module): name for name, module in model.named_modules()}
    if names[id(head)] in weights or names[id(embedding)] in weights:
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)


def _targets(model: PreTrainedModel, name: str) -> Iterator[torch.Tensor]:
    """Tensors ``[rows, in]`` that together, stacked, are the weight called ``name``."""
    modules: Any = model.get_submodule
    parent, _, role = name.rpartition(".")
    try:
        yield modules(name).weight
        return
    except AttributeError:
        pass
    try:
        siblings = modules(parent)
    except AttributeError:
        raise _unknown(name) from None
    if role in PARTS:
        parts = [getattr(siblings, part, None) for part in PARTS[role]]
        if all(part is not None for part in parts):
            yield from (part.weight for part in parts)
            return
    for fused, roles in PARTS.items():
        module = getattr(siblings, fused, None)
        if module is not None and role in roles:
            sizes = _part_sizes(model.config, fused, module.weight.shape[0])
            start = sum(sizes[: roles.index(role)])
            yield module.weight[start : start + sizes[roles.index(role)]]
            return
    raise _unknown(name)


def _unknown(name: str) -> ModelError:
    return ModelError(f"the eager model has no module {name!r}: the graph names it differently")


def _part_sizes(config: Any, fused: str, rows: int) -> list[int]:
    if fused == "gate_up_proj":
        return [rows // 2, rows // 2]
    head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    keys = config.num_key_value_heads * head_dim
    return [rows - 2 * keys, keys, keys]


def positions(attention_mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each token among the valid tokens of its row, as ``generate`` counts them.

    >>> positions(np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])).tolist()
    [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]
    """
    return np.maximum(np.cumsum(attention_mask, axis=1) - 1, 0)


def reference_logits(
    model: PreTrainedModel,
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64] | None = None,
    *,
    chunks: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Logits of every token, computed in chunks through the key/value cache.

    Args:
      model: from :func:`load_eager`.
      input_ids: ``int64 [B, S]``.
      attention_mask: ``int64 [B, S]``, 1 for valid tokens; padding may be left or right. None means
        no padding.
      chunks: lengths that add up to S: ``(S,)`` (the default) is prefill, ``(P, 1, 1)`` decodes two
        tokens after a prompt of P, ``(P, C)`` runs a chunk of C on a cache of P.

    Returns:
      ``float32 [B, S, V]``; rows of padding tokens hold no meaning.
    """
    import torch
    from transformers import DynamicCache

    length = input_ids.shape[1]
    chunks = (length,) if chunks is None else chunks
    if sum(chunks) != length:
        raise ValueError(f"chunks {tuple(chunks)} do not add up to the {length} tokens given")
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    position_ids = positions(mask)
    cache, logits, start = DynamicCache(config=model.config), [], 0
    with torch.inference_mode():
        for size in chunks:
            end = start + size
            output: Any = model(
                input_ids=torch.from_numpy(input_ids[:, start:end]),
                attention_mask=torch.from_numpy(mask[:, :end]),
                position_ids=torch.from_numpy(position_ids[:, start:end]),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(output.logits.numpy())
            start = end
    return np.concatenate(logits, axis=1)
