"""The cosines and sines by which transformers rotates queries and keys."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from eoracc.compiler.frontend.quiet import quiet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray
    from transformers import PretrainedConfig

__all__ = ["RopeTables", "layer_tables"]

_CHUNK = 1 << 14
"""Positions in one call of the rotary embedding, which bounds memory."""

_ROUNDINGS = 16
"""Roundings of a frequency: a power, a quotient, and what scaling does. mobius' tables of real
models differ by up to 4 where they are right."""


class RopeTables:
    """Cosines and sines by position, scaled as attention wants them.

    Attributes:
      layer_type: of the layers that rotate by them; None where all layers do.
      frequencies: number of frequencies, each of which rotates two columns of a head.
      positions: number of positions.
      original: of LongRoPE tables, up to which length a text has those for short ones; else None.
    """

    def __init__(
        self,
        rotary: Any,  # noqa: ANN401 - torch's module
        *,
        layer_type: str | None,
        frequencies: int,
        positions: int,
        original: int | None,
    ) -> None:
        """``rotary`` is the module of the eager model that computes them."""
        self.layer_type = layer_type
        self.frequencies = frequencies
        self.positions = positions
        self.original = original
        self._rotary = rotary

    def whole(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines, ``float32 [P, F]``, a column for each frequency.

        Those of a LongRoPE model have ``original`` rows for short texts, and ``positions`` rows for
        longer ones behind them.
        """
        lengths = [self.positions]
        if self.original is not None:
            lengths.insert(0, self.original)
        chunks = [
            self._at(range(start, min(start + _CHUNK, length)), length)
            for length in lengths
            for start in range(0, length, _CHUNK)
        ]
        cos, sin = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
        return cos, sin

    def equal(self, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> bool:
        """Whether tables ``[P, F]`` differ from these by no more than float32 rounding explains.

        Powers of two are compared and the last position: a table holds nothing but the multiples of
        its frequencies. One that is off by ``u`` is an angle at position ``p`` that is off by ``p``
        times that.
        """
        if self.original is not None or cos.shape != (self.positions, self.frequencies):
            return False
        powers = 1 << np.arange(int(self.positions - 1).bit_length())
        sample = np.array([0, *powers, self.positions - 1])
        expected = self._at(sample.tolist(), self.positions)
        scale = np.hypot(*(part[0] for part in expected))
        frequencies = np.abs(np.arctan2(expected[1][1], expected[0][1]))
        tolerance = _ROUNDINGS * 2.0**-24 * scale * (1 + sample[:, None] * frequencies)
        return all(
            bool((np.abs(table[sample] - part) <= tolerance).all())
            for table, part in zip((cos, sin), expected, strict=True)
        )

    def _at(
        self, positions: Iterable[int], length: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines ``[n, F]`` at ``positions`` of a text of ``length`` tokens."""
        # The last position goes along: the length of a text may decide.
        cos, sin = _call(self._rotary, [*positions, length - 1], self.layer_type)
        columns = _distinct_columns(cos)
        return cos[:-1, columns].numpy(), sin[:-1, columns].numpy()


def layer_tables(config: PretrainedConfig) -> list[RopeTables | None]:
    """The tables of each layer, from the module that computes them in the eager model.

    Layers that share tables share the object.

    Args:
      config: transformers' configuration, which knows the defaults of every ``rope_type``.

    Returns:
      One entry a layer; None where the eager model computes no such tables.

    Raises:
      Exception: of any kind, where transformers cannot compute them.
    """
    layers = int(config.num_hidden_layers)
    rotary = _rotary_embedding(config)
    if rotary is None:
        return [None] * layers
    kinds: list[str | None] = [None] * layers
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = list(config.layer_types)
    tables = {kind: _tables(rotary, config, kind) for kind in dict.fromkeys(kinds)}
    return [tables[kind] for kind in kinds]


def _rotary_embedding(config: PretrainedConfig) -> Any | None:  # noqa: ANN401 - torch's module
    """The rotary embedding of the family; None where it has none, or more than one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # code that the checkpoint brings
        return None
    family = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    classes = [value for name, value in vars(family).items() if name.endswith("RotaryEmbedding")]
    if len(classes) != 1:
        return None
    with quiet():
        return classes[0](config)


def _tables(
    rotary: Any,  # noqa: ANN401 - torch's module
    config: PretrainedConfig,
    layer_type: str | None,
) -> RopeTables | None:
    parameters: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if layer_type is not None and parameters is not None:
        parameters = parameters[layer_type]
    if not parameters:
        return None
    values = _call(rotary, [0, 1], layer_type)[0]
    if not values.isfinite().all():
        raise ValueError("its cosines are no finite numbers")
    columns = _distinct_columns(values)
    if columns is None:
        return None
    positions, original = int(config.max_position_embeddings), None
    if parameters["rope_type"] == "longrope":
        original = int(parameters["original_max_position_embeddings"])
    return RopeTables(
        rotary,
        layer_type=layer_type,
        frequencies=values[:, columns].shape[1],
        positions=positions,
        original=original if original is not None and original < positions else None,
    )


def _call(
    rotary: Any,  # noqa: ANN401 - torch's module
    positions: list[int],
    layer_type: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module returns for one text: cosines and sines ``[n, D]``."""
    options = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.tensor([positions]), **options)
    return cos[0], sin[0]


def _distinct_columns(values: torch.Tensor) -> slice | None:
    """Columns that hold each frequency once in ``values [n, 2 F]``, which hold it twice.

    Returns:
      None where they do not.
    """
    half = values.shape[-1] // 2
    if torch.equal(values[:, :half], values[:, half:]):
        return slice(half)
    if torch.equal(values[:, ::2], values[:, 1::2]):
        return slice(0, None, 2)
    return None
