"""The oracle: the transformers model in eager PyTorch with compressed weights.

Parity compares an artifact against this model. It shares nothing with the graph but the checkpoint
and the arrays that compression produced.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import override

from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.errors import ModelError
from eoracc.passes.graph.names import PARTS
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_eager", "module_rows", "positions", "reference_logits", "replace_weights"]


def load_eager(
    folder: Path,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    trust_remote_code: bool = False,
    config: PretrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a checkpoint and put ``weights`` in place of its modules' own.

    Args:
      folder: a Hugging Face folder in safetensors form.
      weights: by module name, ``float32 [out, in]``. A name may be a part of a module that the
        family stores fused (``q_proj`` of ``qkv_proj``) or a packed module that it stores in parts.
        ``NAME.v [r, in]`` and ``NAME.u [out, r]`` make two modules of the one called ``NAME``.
        Values are read one at a time, so a lazy mapping keeps memory at one model.
      trust_remote_code: let transformers run code that the checkpoint brings.
      config: replaces the folder's own, for a model with fewer blocks.

    Returns:
      The model in float32, evaluation mode, eager attention. A tied head that has a weight of its
      own, or whose embedding has one, is untied.

    Raises:
      ModelError: a name that the model does not have, or a weight of another shape.
    """
    from transformers import AutoModelForCausalLM

    # transformers' threads would hold parts of the checkpoint twice, varying from run to run.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with quiet():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    replace_weights(model, weights)
    return model


def replace_weights(model: PreTrainedModel, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace the weights of a model's modules.

    Args:
      model: from :func:`load_eager`.
      weights: as there.

    Raises:
      ModelError: a name that the model does not have, or a weight of another shape.
    """
    for name in weights:
        whole, _, factor = name.rpartition(".")
        if factor == "v" and f"{whole}.u" in weights:
            _factorize(model, whole, rank=len(weights[name]))
    modules: dict[str, Any] = dict(model.named_modules())
    _untie(model, modules, weights)
    for name in weights:
        weight = np.asarray(weights[name], np.float32)
        targets = [module.weight[rows] for module, rows in module_rows(modules, model.config, name)]
        width, rows = targets[0].shape[1], [target.shape[0] for target in targets]
        if weight.shape != (sum(rows), width):
            raise ModelError(
                f"{name}: a weight of shape {weight.shape} does not fit the eager model's "
                f"({sum(rows)}, {width})"
            )
        with warnings.catch_warnings():
            # The array is read-only, and PyTorch only reads it.
            warnings.simplefilter("ignore", UserWarning)
            parts = torch.split(torch.from_numpy(weight), rows)
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)


def _untie(
    model: PreTrainedModel,
    modules: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
) -> None:
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    if any(name in weights for name, module in modules.items() if module in (head, embedding)):
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)


def module_rows(
    modules: Mapping[str, Any], config: PretrainedConfig, name: str
) -> list[tuple[Any, slice]]:
    """The place of the weight called ``name`` in a model.

    Args:
      modules: of the model, by name.
      config: of the model.
      name: of a module, or of a part, a whole or a factor as in :func:`load_eager`.

    Returns:
      Modules and the rows of their weights that, one below the other, are that weight.

    Raises:
      ModelError: the model has no such module.
    """
    if name in modules:
        return [(modules[name], slice(None))]
    parent, _, role = name.rpartition(".")
    if role in _FACTORS:
        return _factor_rows(modules, config, parent, role)
    parts = [modules.get(f"{parent}.{part}") for part in PARTS.get(role, ())]
    if parts and None not in parts:
        return [(part, slice(None)) for part in parts]
    for whole, roles in PARTS.items():
        module = modules.get(f"{parent}.{whole}")
        if module is not None and role in roles:
            if isinstance(module, _Parts):
                return [(module.get_submodule(role), slice(None))]
            sizes = _part_sizes(config, whole, module.weight.shape[0])
            place = roles.index(role)
            first = sum(sizes[:place])
            return [(module, slice(first, first + sizes[place]))]
    raise ModelError(
        f"the eager model has no module {quoted(name)}: the graph names it differently"
    )


def _part_sizes(config: PretrainedConfig, whole: str, rows: int) -> list[int]:
    if whole == "gate_up_proj":
        return [rows // 2, rows // 2]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * head_dim
    return [rows - 2 * keys, keys, keys]


# --- factorised modules ---------------------------------------------------------------------------

_FACTORS = ("v", "u")
"""Names of the two modules of a factorised module, in the order of computation."""


class _Parts(torch.nn.Module):
    """A fused module as its parts, with concatenated outputs."""

    def __init__(self, parts: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        for role, part in parts.items():
            self.add_module(role, part)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def _factorize(model: PreTrainedModel, name: str, *, rank: int) -> None:
    """Split the module ``name`` into two, ``v`` and ``u``; ``u`` takes the bias.

    A part of a fused module becomes a module of its own; the parts of a packed one share ``v``.
    """
    paths = {module: path for path, module in model.named_modules()}
    modules: dict[str, Any] = {path: module for module, path in paths.items()}
    rows = module_rows(modules, model.config, name)
    if all(isinstance(module, torch.nn.Sequential) for module, _ in rows):
        return  # it has them already
    if rows[0][1] != slice(None):
        fused, _ = rows[0]
        parts = _split(fused, paths[fused].rpartition(".")[2], model.config)
        model.set_submodule(paths[fused], parts)
        paths |= {part: f"{paths[fused]}.{role}" for role, part in parts.named_children()}
        rows = [(parts.get_submodule(name.rpartition(".")[2]), slice(None))]
    first = _empty_linear(rows[0][0].in_features, rank)
    for module, _ in rows:
        second = _empty_linear(rank, module.out_features)
        second.bias = module.bias
        model.set_submodule(
            paths[module], torch.nn.Sequential(OrderedDict(v=first, u=second)).eval()
        )


def _split(fused: torch.nn.Linear, whole: str, config: PretrainedConfig) -> _Parts:
    sizes = _part_sizes(config, whole, fused.out_features)
    weights = torch.split(fused.weight, sizes)
    bias: torch.nn.Parameter | None = fused.bias
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    parts = {}
    for role, weight, own in zip(PARTS[whole], weights, biases, strict=True):
        part = parts[role] = _empty_linear(fused.in_features, len(weight))
        part.weight.copy_(weight)
        if own is not None:
            part.bias = torch.nn.Parameter(own.clone(), requires_grad=False)
    return _Parts(parts)


def _empty_linear(in_features: int, out_features: int) -> torch.nn.Linear:
    # Created without values first: PyTorch's initial values are random.
    made = torch.nn.Linear(in_features, out_features, bias=False, device="meta")
    return made.to_empty(device="cpu").requires_grad_(requires_grad=False)


def _factor_rows(
    modules: Mapping[str, Any], config: PretrainedConfig, whole: str, factor: str
) -> list[tuple[Any, slice]]:
    """As :func:`module_rows`, of a factor of ``whole``."""
    halves = [module for module, _ in module_rows(modules, config, whole)]
    if not all(isinstance(module, torch.nn.Sequential) for module in halves):
        raise ModelError(
            f"the eager model has {quoted(whole)} as one module, without the factor "
            f"{quoted(factor)}"
        )
    # The parts of a packed module share their input.
    parts = dict.fromkeys(module.get_submodule(factor) for module in halves)
    return [(module, slice(None)) for module in parts]


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
    length = input_ids.shape[1]
    chunks = (length,) if chunks is None else chunks
    if sum(chunks) != length:
        raise ValueError(f"chunks {tuple(chunks)} do not add up to the {length} tokens given")
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    if not _is_long_rope(model.config):
        return _batch_logits(model, input_ids, mask, chunks)
    # transformers rotates all rows as the longest of them wants it: alone each gets its own.
    rows = [slice(row, row + 1) for row in range(len(input_ids))]
    return np.concatenate([_batch_logits(model, input_ids[i], mask[i], chunks) for i in rows])


def _is_long_rope(config: PretrainedConfig) -> bool:
    sections = rope_sections(config)
    return any(section.get("rope_type") == "longrope" for section in sections)


def _batch_logits(
    model: PreTrainedModel,
    input_ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    chunks: Sequence[int],
) -> NDArray[np.float32]:
    """:func:`reference_logits`, of all rows in one batch."""
    from transformers import DynamicCache

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
