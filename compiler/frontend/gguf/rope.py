"""The rotary embedding of a GGUF file as transformers' ``rope_parameters``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.gguf.llama3 import recover_llama3
from eoracc.printable import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from eoracc.compiler.frontend.gguf.reading import GgufFile

__all__ = ["rope_scaling"]

_FREQUENCIES = "rope_freqs.weight"
_LONG = "rope_factors_long.weight"
_SHORT = "rope_factors_short.weight"
_RELATIVE = 1e-6
"""Largest relative difference between a stored float32 and the value that it was rounded from."""


def rope_scaling(file: GgufFile, *, theta: float, dims: int, context: int) -> Mapping[str, Any]:
    """How the positions are scaled, in the words of ``rope_parameters``; empty for not at all.

    Args:
      file: its keys ``rope.scaling.*`` and its tensors ``rope_f*.weight`` are read.
      theta: the base of the frequencies.
      dims: dimensions of a head that are rotated.
      context: ``max_position_embeddings``.

    Raises:
      ModelError: the file asks for a scaling that transformers does not have.
    """
    kind = file.text(file.own("rope.scaling.type"))
    factor = file.real(file.own("rope.scaling.factor"))
    legacy = file.real(file.own("rope.scale_linear"))
    original = file.integer(file.own("rope.scaling.original_context_length"))
    file.consume([file.own("rope.scaling.finetuned")])  # says how it was trained, not what it is
    divisors = file.vector(_FREQUENCIES, dims // 2)
    tables = [file.vector(name, dims // 2) for name in (_SHORT, _LONG)]
    if factor is None:
        factor = legacy
    if factor is not None and factor < 0:
        raise file.refusal(f"key {file.own('rope.scaling.factor')} is negative")
    factor = factor or 1.0  # 0 and an absent key both mean that nothing is scaled
    original = original or context

    if any(table is not None for table in tables):
        if kind not in (None, "none", "longrope") or divisors is not None:
            raise file.refusal(f"the tensors {_SHORT} and {_LONG} contradict another rope scaling")
        return _longrope(file, tables, factor=factor, original=original, context=context)
    if divisors is not None and not (divisors == 1).all():
        if kind != "none" and factor != 1:
            raise file.refusal(f"tensor {_FREQUENCIES} contradicts rope scaling by {factor}")
        return _divided(file, divisors, theta=theta, dims=dims, original=original, context=context)
    if kind == "longrope":
        raise file.refusal(f"rope scaling of type longrope needs the tensors {_SHORT} and {_LONG}")
    if kind == "yarn":
        return _yarn(file, factor=factor, original=original)
    if kind == "none" or (kind in (None, "linear") and factor == 1):
        return {}
    if kind in (None, "linear"):  # a factor without a type is linear
        return {"rope_type": "linear", "factor": factor}
    raise file.refusal(
        f"rope scaling of type {quoted(kind)} is not known (known: linear, yarn, longrope)"
    )


def _yarn(file: GgufFile, *, factor: float, original: int) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for key, field in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        value = file.real(file.own(f"rope.scaling.{key}"))
        if value is not None:
            parameters[field] = value
    extrapolation = file.own("rope.scaling.yarn_ext_factor")
    if file.real(extrapolation) not in (None, -1.0, 1.0):  # -1 stands for the default
        raise file.refusal(
            f"key {extrapolation} is not 1, and transformers' YaRN has no such field"
        )
    # The product with YaRN's own factor in llama.cpp, but converters have written it for the
    # whole: which one a file means cannot be told unless it is neutral.
    attention = file.own("rope.scaling.attn_factor")
    if (file.real(attention) or 1.0) != 1.0:
        raise file.refusal(f"key {attention} does not say whether YaRN's own factor is part of it")
    logarithm = file.real(file.own("rope.scaling.yarn_log_multiplier"))
    if logarithm:
        parameters.update(mscale=1.0, mscale_all_dim=logarithm)
    return parameters


def _longrope(
    file: GgufFile, tables: list[np.ndarray | None], *, factor: float, original: int, context: int
) -> dict[str, Any]:
    short, long = tables
    if short is None or long is None:
        raise file.refusal(f"only one of the tensors {_SHORT} and {_LONG} is there")
    parameters: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [float(value) for value in short],
        "long_factor": [float(value) for value in long],
        "original_max_position_embeddings": original,
    }
    if factor != 1:
        parameters["factor"] = factor
    stretch = factor if factor != 1 else context / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    attention = file.real(file.own("rope.scaling.attn_factor"))
    if attention and abs(attention - usual) > _RELATIVE * usual:
        parameters["attention_factor"] = attention
    return parameters


def _divided(
    file: GgufFile,
    divisors: np.ndarray,
    *,
    theta: float,
    dims: int,
    original: int,
    context: int,
) -> dict[str, Any]:
    if (divisors <= 0).any():
        raise file.refusal(f"tensor {_FREQUENCIES} holds divisors that are not positive")
    found = recover_llama3(divisors, theta=theta, dims=dims, hints=(original, context))
    if found is not None:
        return found
    # LongRoPE with equal tables divides by any numbers, and by nothing else at a factor of 1.
    table = [float(value) for value in divisors]
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "short_factor": table,
        "long_factor": table,
        "original_max_position_embeddings": context,
    }
