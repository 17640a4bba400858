"""Tolerances for results with activations rounded to int8 (``accuracy_level`` 4).

A kernel at that level rounds each row of a linear's input, in blocks of 32 columns, to multiples of
a step ``s = max|x| / 127``. The tolerances follow from one model of the errors that this makes, and
are no wider than it asks for. Everything else is float32, see
:mod:`eoracc.compiler.targets.parity_record`.

**The model.** An element below half a step becomes 0. The error of every other one is uniform on
``[-s / 2, s / 2]``, so its variance is ``s^2 / 12``, and errors are independent. (Arithmetic that a
kernel may take instead, bfloat16 products with many rows, leaves less.) A sum of such errors with
weights has tails no heavier than those of a normal distribution of its mean square ``v``: the
moment-generating function of a uniform variable, ``sinh(a) / a``, is at most ``exp(a^2 / 6)``. So
it exceeds ``sqrt(2 ln(4 n / p) v)`` anywhere among ``n`` sums with probability ``p`` at most
(Chernoff and the union bound; a mean that is not 0 costs a factor below 2 of ``p``).

**One linear.** Nothing is left to chance: its inputs are multiples of a power of two with 127 times
that power in every block, which rounding leaves as they are (:func:`representable_inputs`). A
kernel with another step, fewer levels or other codes is off by far more than float32 rounding.
Integer factors round the output of the down-projection as well, whose errors are bounded as above
with ``p = 1e-12`` an output.

**The whole model.** Rounding errors are small enough that the change of a logit is a linear
function of them: a sum as above over all linears, tokens and columns, whose weights are the
network's derivatives. Its mean square needs no derivatives: :func:`random_rounding` puts errors
drawn from the model into what all linears of the eager model multiply, and the logits move by a
draw of that sum. A token's mean square is taken over :data:`ROUNDING_DRAWS` draws and the
vocabulary. That of a single logit is larger by a share that is taken over all draws and tokens of
the call, and of which the largest counts. The tolerance of a call is that of its token whose logits
move most, with ``p = 1e-6`` for all logits of the call.

Draws estimate the mean square, they do not bound it. Most of what moves is a shift that all logits
of a token share, so that a token has little more than one number from each draw: 7.3 standard
deviations, those of a vocabulary of 49152, are then exceeded with probability 8e-5 (Student's t of
8 degrees of freedom), and less since the largest of several tokens counts.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from eoracc.compiler.eager.model import module_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from eoracc.passes.graph.linears import Linear
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = [
    "ROUNDING_DRAWS",
    "factor_tolerance",
    "random_rounding",
    "representable_inputs",
    "rounding_bound",
]

ROUNDING_DRAWS = 8
"""Draws that the variance of a token's logits is estimated from."""

_BLOCK = 32
_LEVELS = 127
_RUN = 8
"""Columns of the smallest block: every group size is a multiple."""
_LINEAR_CHANCE = 1e-12
_CASE_CHANCE = 1e-6
_UNIFORM_VARIANCE = 1 / 12
"""Of a rounding error, in squares of a step."""
_NO_ADAPTER: Mapping[str, LowRank] = MappingProxyType({})


def representable_inputs(rng: np.random.Generator, rows: int, width: int) -> NDArray[np.float32]:
    """Random inputs ``[rows, width]`` of a linear that rounding to int8 leaves as they are.

    Columns come in blocks of 32 with a power of two each, of which every element is a multiple
    between -127 and 127. One in 8 columns is one of these two, so that smaller blocks (of groups
    that are no multiple of 32) have the same step.
    """
    codes = rng.integers(-_LEVELS, _LEVELS + 1, (rows, width))
    runs = range(0, width, _RUN)
    largest = [rng.integers(run, min(run + _RUN, width), rows) for run in runs]
    for columns in largest:
        codes[np.arange(rows), columns] = rng.choice((-_LEVELS, _LEVELS), rows)
    exponents = rng.integers(-8, -4, (rows, -(-width // _BLOCK))).repeat(_BLOCK, axis=1)
    inputs: NDArray[np.float32] = np.ldexp(codes.astype(np.float32), exponents[:, :width])
    return inputs


def _steps(x: torch.Tensor, block: int) -> torch.Tensor:
    """The step of each element's block, ``[..., K]``."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -columns % block))
    largest = padded.abs().reshape(*x.shape[:-1], -1, block).amax(-1)
    steps: torch.Tensor = largest.repeat_interleave(block, -1)[..., :columns] / _LEVELS
    return steps


class _Once:
    """Tensors that are made once for all modules that read one tensor."""

    def __init__(self) -> None:
        self._of: torch.Tensor | None = None
        self._made: dict[Hashable, torch.Tensor] = {}

    def get(
        self, of: torch.Tensor, key: Hashable, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        if self._of is not of:
            self._of, self._made = of, {}
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@contextmanager
def random_rounding(
    model: PreTrainedModel,
    linears: Iterable[Linear],
    generator: torch.Generator,
    adapter: Mapping[str, LowRank] = _NO_ADAPTER,
) -> Iterator[None]:
    """Add random rounding errors to what the compressed ``linears`` of ``model`` multiply.

    These are their inputs and, where a linear has factors, the outputs of the down-projection. What
    several linears share gets the same errors for all of them.

    Args:
      model: the eager one.
      linears: of the graph.
      generator: of the errors.
      adapter: factors on top of theirs, by linear.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    inputs, downs = _Once(), _Once()

    def moved(x: torch.Tensor, block: int) -> torch.Tensor:
        step = _steps(x, block)
        errors = torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5
        return torch.where(x.abs() < step / 2, 0, x + errors * step)

    def of_input(block: int) -> Any:  # noqa: ANN401 - a hook of PyTorch's
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:  # noqa: ANN401
            x = given[0]
            return (inputs.get(x, block, lambda: moved(x, block)), *given[1:])

        return hook

    def of_down(factors: LowRank, own: slice, rows: slice) -> Any:  # noqa: ANN401
        def errors(x: torch.Tensor) -> torch.Tensor:
            down = x @ torch.from_numpy(factors.down()).T
            return moved(down, _BLOCK) - down

        def hook(_: Any, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
            up = torch.from_numpy(factors.up()[own])
            y[..., rows] += downs.get(given[0], factors, lambda: errors(given[0])) @ up.T
            return y

        return hook

    blocks: dict[torch.nn.Module, int] = {}
    with ExitStack() as stack:
        for linear in linears:
            if linear.quantized is None:
                continue
            block, end = math.gcd(linear.quantized.group_size, _BLOCK), 0
            for module, rows in module_rows(modules, model.config, linear.name):
                # Parts of a fused module read one input: the largest block has the largest steps.
                blocks[module] = max(block, blocks.get(module, 0))
                first, end = end, end + len(module.weight[rows])
                for factors in (linear.factors, adapter.get(linear.name)):
                    if factors is not None and factors.rank:
                        hook = of_down(factors, slice(first, end), rows)
                        stack.callback(module.register_forward_hook(hook).remove)
        for module, block in blocks.items():
            stack.callback(module.register_forward_pre_hook(of_input(block)).remove)
        yield


def factor_tolerance(linear: Linear, inputs: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Tolerance of a linear's outputs to rounding between its integer factors.

    Args:
      linear: of the graph.
      inputs: ``float32 [rows, K]``, from :func:`representable_inputs`.

    Returns:
      ``float32 [rows, N]``, or None for a linear without integer factors, which needs none.
    """
    factors = linear.factors
    if factors is None or not factors.rank or factors.lora_a.dtype != np.int8:
        return None
    down = torch.from_numpy(inputs).double() @ torch.from_numpy(factors.down()).double().T
    squares = (_steps(down, _BLOCK) ** 2) @ (torch.from_numpy(factors.up()).double() ** 2).T
    deviation = torch.sqrt(_UNIFORM_VARIANCE * squares)
    return (math.sqrt(2 * math.log(4 / _LINEAR_CHANCE)) * deviation).float().numpy()


def rounding_bound(moved: NDArray[np.float32]) -> float:
    """Tolerance of the logits of one call to the rounding of activations.

    Args:
      moved: by which :func:`random_rounding` moves them, ``[draws, tokens, V]``.
    """
    squares = np.square(moved, dtype=np.float64)
    of_tokens = squares.mean(axis=(0, 2))
    present = of_tokens > 0
    if not present.any():
        return 0.0
    shares = (squares[:, present] / of_tokens[present, None]).mean(axis=(0, 1))
    square = of_tokens.max() * shares.max()
    return math.sqrt(2 * math.log(4 * moved[0].size / _CASE_CHANCE) * square)
