"""Tolerances for results with activations rounded to int8 (``accuracy_level`` 4).

A kernel at that level rounds each row of a linear's input, in blocks of 32 columns, to multiples of
a step ``s = max|x| / 127``: an error of at most ``s / 2`` an element. (Arithmetic that it may take
instead, bfloat16 products with many rows, is off by at most ``2^-8 |x w|`` a product, which is no
more than what a step allows.) Everything else is float32, see
:mod:`eoracc.compiler.targets.parity_record`.

**One linear.** The rounding errors of the columns are independent and of zero mean, so that a sum
of them leaves ``sqrt(ln(2 / p) / 2) * sqrt(sum (s_k w_k)^2)`` with probability ``p`` at most
(Hoeffding, 1963, theorem 2). ``p = 1e-12`` an output gives 3.8 times the root of the sum of
squares, against ``sum s_k |w_k| / 2`` in the worst case, which grows with K and not with its root.

**The whole model.** How rounding errors grow through attention and norms is measured, not bounded:
the eager model runs once more with its linears' inputs rounded in the same way. The artifact
rounds the same values to the same grid, though not bit for bit, so its error is another draw from
the same distribution, and stays below ``sqrt(2 ln(2 n / p))`` standard deviations for all ``n``
logits of a case; the standard deviation is that of the token whose logits moved most, twice, since
the two draws need not be of one size.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from eoracc.compiler.eager.model import module_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel

    from eoracc.passes.graph.linears import Linear

__all__ = ["linear_tolerance", "round_activations", "rounded_activations", "rounding_tolerance"]

_BLOCK = 32
_LEVELS = 127
_LINEAR_CHANCE = 1e-12
_CASE_CHANCE = 1e-9


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """``x [..., K]`` rounded in blocks of ``block`` columns to 255 levels about 0.

    >>> round_activations(torch.tensor([[127.0, 0.4, -3.6, 0.0]]), 4).tolist()
    [[127.0, 0.0, -4.0, 0.0]]
    """
    step = _steps(x, block)
    codes = torch.where(step > 0, x / step, torch.zeros_like(x)).round()
    return codes * step


def _steps(x: torch.Tensor, block: int) -> torch.Tensor:
    """The step of each element's block, ``[..., K]``."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    largest = padded.abs().reshape(*x.shape[:-1], -1, block).amax(-1)
    steps: torch.Tensor = largest.repeat_interleave(block, -1)[..., :columns] / _LEVELS
    return steps


@contextmanager
def rounded_activations(model: PreTrainedModel, linears: Iterable[Linear]) -> Iterator[None]:
    """Run the eager ``model`` with the inputs of its compressed ``linears`` rounded to int8."""
    modules: dict[str, Any] = dict(model.named_modules())
    blocks: dict[torch.nn.Module, int] = {}
    for linear in linears:
        if linear.compressed is not None:
            for module, _ in module_rows(modules, model.config, linear.name):
                blocks[module] = math.gcd(linear.compressed.group_size, _BLOCK)

    def hook(block: int) -> Any:  # noqa: ANN401 - a hook of PyTorch's
        return lambda _, inputs: (round_activations(inputs[0], block), *inputs[1:])

    handles = [module.register_forward_pre_hook(hook(block)) for module, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_tolerance(linear: Linear, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Tolerance of one linear's outputs to the rounding of its input, ``float32 [rows, N]``.

    The input of the up-projection counts as rounded too, as it is with integer factors.

    Args:
      linear: compressed.
      inputs: ``[rows, K]``.
    """
    assert linear.compressed is not None  # noqa: S101 - the caller asks for compressed ones
    block = math.gcd(linear.compressed.group_size, _BLOCK)
    x = torch.from_numpy(inputs).double()
    steps = _steps(x, block)
    weight = torch.from_numpy(linear.effective_weight()).double()
    squares = (steps**2) @ (weight**2).T
    if linear.factors is not None and linear.factors.rank:
        down = x @ torch.from_numpy(linear.factors.down()).double().T
        up = torch.from_numpy(linear.factors.up()).double()
        # Rounding the input changes t by far less than a step of t.
        squares += (_steps(down, _BLOCK) ** 2) @ (up**2).T
    deviation = torch.sqrt(squares)
    return (math.sqrt(math.log(2 / _LINEAR_CHANCE) / 2) * deviation).float().numpy()


def rounding_tolerance(exact: NDArray[np.float32], rounded: NDArray[np.float32]) -> float:
    """Tolerance of the logits of one case to the rounding of activations.

    Args:
      exact: of the eager model, ``[tokens, V]``.
      rounded: of the same with :func:`rounded_activations`.
    """
    moved = np.sqrt(np.mean((rounded.astype(np.float64) - exact) ** 2, axis=-1))
    return float(2 * math.sqrt(2 * math.log(2 * exact.size / _CASE_CHANCE)) * moved.max())
