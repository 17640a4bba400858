"""Grams of gradients: the effect of an error in a linear's output on the model's predictions.

The divergence of the compressed model's predictions from the original's has no gradient at the
original's weights: it is zero there, and least. Its second-order form is the Fisher information,
the second moment of the gradient of ``log p(y)`` with labels ``y`` drawn from the model's own
predictions. For an error ``E`` of one linear's weight, and gradients that are taken as independent
of the inputs,

    ``KL(original || compressed) ~ 1/2 tr(G E H E^T)`` per token,

``G = E[g g^T]`` of the gradients ``g`` at the linear's output, ``H = E[x x^T]`` of its input.

Source: Martens and Grosse, K-FAC, arXiv:1503.05671, section 3, whose two factors these are.

One backward pass gives ``G`` of all linears, a decoder block at a time. Going forward, only what
enters each block is kept, on disk; going backward, each block is run again from there, by the
model's own code. So the activations and the ``G`` of one block are in memory, whatever the depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from eoracc.compiler.eager.model import module_rows, positions
from eoracc.compiler.eager.run_files import RunFiles
from eoracc.errors import ModelError
from eoracc.passes.graph.linears import block_of
from eoracc.passes.solvers.gram import GramSum
from eoracc.printable import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from eoracc.compiler.text.windows import Windows
    from eoracc.passes.calibrate import Precision
    from eoracc.passes.progress import Phase, Progress
    from eoracc.passes.solvers.gram import AddOuterProducts

__all__ = ["Labels", "draw_labels", "output_gradient_grams"]

Labels = Literal["model", "text"]
"""Source of a gradient's label: drawn from the model's predictions, or the text's next token."""

_BATCH = 4
"""Windows per forward pass of a block."""
_CHUNK = 128
"""Tokens whose logits are in memory at the same time."""


def output_gradient_grams(
    model: PreTrainedModel,
    names: Sequence[str],
    windows: Windows,
    *,
    folder: Path,
    key: str,
    labels: Labels,
    draws: int,
    seed: int,
    precision: Precision,
    add: AddOuterProducts | None = None,
    progress: Progress,
    embedding: str | None = None,
) -> None:
    """Write ``G = mean_t g_t g_t^T`` of every linear to a file of its own.

    It is the tensor ``output_gram``, ``float32 [N, N]``, of ``<folder>/<name>.safetensors``, where
    ``token_weights``, ``float32 [tokens]``, padding included, holds ``||g_t||^2``.
    ``g_t`` is the gradient, in nats, of ``sum_s log p(y_s | earlier tokens)`` at the linear's
    output of token ``t``; the mean counts tokens as the windows do, padding for nothing.

    Args:
      model: from :func:`.load_eager`; cast to ``precision``, and to a faster attention where it has
        one.
      names: of linears in decoder blocks; of parts or wholes of modules, as in ``load_eager``.
      windows: the text.
      folder: where the files go, and what an interrupted run has finished.
      key: digest of all that the result depends on; what a run with another key left is discarded.
      labels: ``model`` for the Fisher information, ``text`` for the empirical Fisher.
      draws: labels a token; each takes a backward pass of its own.
      seed: of the draws. A window's depend on its place alone, not on how windows are batched.
      precision: of the passes.
      add: how products of gradients are made; None makes them in float32.
      progress: shown a step a block.
      embedding: names the file with the same of what enters the first block; None for none.

    Raises:
      ModelError: the model's blocks cannot be run one by one, or a gradient is NaN or Inf.
    """
    files = RunFiles(folder, key)
    run = _Run(model, names, windows, files, labels, draws, seed, embedding)
    with progress.phase("gradients", len(run.layers) + 2) as phase:
        files.resume()
        model.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)  # type: ignore[arg-type]
        _use_fast_attention(model)
        run.forward(phase)
        run.head(phase)
        run.backward(phase, add)


def draw_labels(
    logits: torch.Tensor, uniform: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from predictions, by the inverse of their distribution function.

    Args:
      logits: ``float32 [tokens, V]``.
      uniform: in 0..1, ``[draws, tokens]``.

    Returns:
      Labels ``int64 [draws, tokens]`` and probabilities ``float32 [tokens, V]``.

    >>> logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    >>> labels, _ = draw_labels(logits, np.array([[0.1], [0.3], [0.69], [0.71], [1.0]]))
    >>> labels.flatten().tolist()
    [0, 1, 1, 2, 2]
    """
    probabilities = logits.softmax(-1)
    steps = probabilities.cumsum(-1)
    # Rounding leaves the sum below 1; draws above it get the last label.
    heights = torch.from_numpy(uniform.T.astype(np.float32)) * steps[:, -1:]
    labels = torch.searchsorted(steps, heights.contiguous(), right=True)
    return labels.clamp(max=logits.shape[-1] - 1).T, probabilities


@dataclass(eq=False)
class _Run:
    """One backward pass over a text, with its files on disk."""

    model: PreTrainedModel
    names: Sequence[str]
    windows: Windows
    files: RunFiles
    labels: Labels
    draws: int
    seed: int
    embedding: str | None = None

    def __post_init__(self) -> None:
        self.layers = _layers(self.model, self.names)
        self._starts = range(0, len(self.windows.input_ids), _BATCH)

    # --- files ------------------------------------------------------------------------------------

    def _file(self, what: str, block: int, start: int) -> str:
        return f"{what}-{block:03d}-{start:05d}.safetensors"

    def _keep(self, what: str, block: int, start: int, tensor: torch.Tensor) -> None:
        tensors = {what: tensor.detach().contiguous()}
        self.files.put(self._file(what, block, start), partial(save_tensors, tensors))

    def _kept(self, what: str, block: int, start: int) -> torch.Tensor:
        return load_tensors(self.files.folder / self._file(what, block, start))[what]

    def _finish(self, left: int, *done: tuple[str, int]) -> None:
        """``left`` blocks, with the head, are left; the files ``done`` have served."""
        self.files.finish(
            left, {self._file(what, block, start) for what, block in done for start in self._starts}
        )

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, phase: Phase) -> None:
        """Save the input of every block, and the output of the last one."""
        if self.files.left is None:
            for start in self._starts:
                with self._kept_inputs(start), torch.inference_mode():
                    self.model.base_model(**self._inputs(slice(start, start + _BATCH)))
            self._finish(len(self.layers) + 1)
        phase.advance("forward")

    @contextmanager
    def _kept_inputs(self, start: int) -> Iterator[None]:
        def keep(block: int) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
                self._keep("hidden", block, start, _hidden(args, kwargs))

            return hook

        def keep_last(_: Any, __: Any, output: object) -> None:  # noqa: ANN401
            if not isinstance(output, torch.Tensor):
                raise ModelError(
                    f"{type(self.layers[-1]).__name__}: its blocks give more than one tensor, "
                    "which 'calibrate_outputs: {by: logits}' cannot run one by one"
                )
            self._keep("hidden", len(self.layers), start, output)

        handles = [
            layer.register_forward_pre_hook(keep(block), with_kwargs=True)
            for block, layer in enumerate(self.layers)
        ]
        handles.append(self.layers[-1].register_forward_hook(keep_last))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, rows: slice) -> dict[str, Any]:
        mask = self.windows.attention_mask[rows]
        return {
            "input_ids": torch.from_numpy(self.windows.input_ids[rows]),
            "attention_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions(mask)),
            "use_cache": False,
        }

    # --- the head ---------------------------------------------------------------------------------

    def head(self, phase: Phase) -> None:
        """Save the gradient at the output of the last block."""
        last = len(self.layers)
        if self.files.is_left(last):
            if "logits_to_keep" not in inspect.signature(self.model.forward).parameters:
                raise ModelError(
                    f"{type(self.model).__name__}: takes no 'logits_to_keep', without which "
                    "'calibrate_outputs: {by: logits}' would hold the logits of all tokens"
                )
            for start in self._starts:
                hidden = self._kept("hidden", last, start)
                gradients = [self._head(start + i, row) for i, row in enumerate(hidden)]
                self._keep("gradient", last, start, torch.stack(gradients, dim=1))
            self._finish(last, ("hidden", last))
        phase.advance("head")

    def _head(self, window: int, hidden: torch.Tensor) -> torch.Tensor:
        """The gradient ``[draws, S, D]`` at the last hidden states ``[S, D]`` of one window."""
        inputs = self._inputs(slice(window, window + 1))
        hidden = hidden[None].requires_grad_()
        gradients = torch.zeros(self.draws, *hidden.shape[1:], dtype=hidden.dtype)
        ids, mask = (
            torch.from_numpy(array[window])
            for array in (self.windows.input_ids, self.windows.attention_mask)
        )
        # Every prediction at a token of text; with the text's own label that must be text as well.
        predicted = mask.bool()
        if self.labels == "text":
            predicted = predicted[:-1] & predicted[1:]
        uniform = np.random.default_rng([self.seed, window]).random((self.draws, len(ids)))
        with self._passing_on(hidden):
            for chunk in torch.split(predicted.nonzero().flatten(), _CHUNK):
                logits = self.model(**inputs, logits_to_keep=chunk).logits[0]
                drawn, slope = draw_labels(logits.detach().float(), uniform[:, chunk.numpy()])
                chosen = ids[chunk + 1].expand(self.draws, -1) if self.labels == "text" else drawn
                for draw, label in enumerate(chosen):
                    # The gradient of log p(label) with respect to the logits.
                    one = torch.nn.functional.one_hot(label, slope.shape[-1])
                    (gradient,) = torch.autograd.grad(
                        logits, hidden, (one - slope).to(logits.dtype), retain_graph=True
                    )
                    gradients[draw] += gradient[0]
        return gradients

    @contextmanager
    def _passing_on(self, hidden: torch.Tensor) -> Iterator[None]:
        """Make the last block return ``hidden``, and skip the computation of all blocks."""

        def forward_of(block: int) -> Callable[..., torch.Tensor]:
            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
                return hidden if block == len(self.layers) - 1 else _hidden(args, kwargs)

            return forward

        with _replaced(self.layers, forward_of):
            yield

    # --- backward ---------------------------------------------------------------------------------

    def backward(self, phase: Phase, add: Callable[..., None] | None) -> None:
        """Sum the Grams of every block's linears, the last block first."""
        modules: Mapping[str, Any] = dict(self.model.named_modules())
        for block in reversed(range(len(self.layers))):
            if self.files.is_left(block):
                places = {
                    name: module_rows(modules, self.model.config, name)
                    for name in self.names
                    if block_of(name) == block
                }
                self._block(block, places, add)
                done = [("hidden", block), ("gradient", block + 1)]
                self._finish(block, *done, *([] if block else [("gradient", 0)]))
            phase.advance(f"block {block}")

    def _block(
        self,
        block: int,
        places: Mapping[str, Sequence[tuple[Any, slice]]],
        add: Callable[..., None] | None,
    ) -> None:
        sums: dict[str, _Statistics] = {}
        for start in self._starts:
            rows = slice(start, start + _BATCH)
            mask = self.windows.attention_mask[rows]
            weights = mask.astype(np.float32)
            if self.windows.weights is not None:
                weights *= self.windows.weights[rows, None]
            hidden = self._kept("hidden", block, start).requires_grad_()
            arriving: list[torch.Tensor] = []
            with _recorded(module for place in places.values() for module, _ in place) as seen:
                output = self._run(block, hidden, self._inputs(rows))
                for draw, gradient in enumerate(self._kept("gradient", block + 1, start)):
                    (before,) = torch.autograd.grad(output, hidden, gradient, retain_graph=True)
                    arriving.append(before)
                    if block == 0 and self.embedding is not None:
                        entering = before.reshape(-1, before.shape[-1]).float().numpy()
                        total = sums.setdefault(
                            self.embedding, _Statistics(entering.shape[1], self.draws, add)
                        )
                        total.add(entering, weights.reshape(-1), first=draw == 0)
                    for name, place in places.items():
                        gradients = torch.cat(
                            [seen[module][..., part] for module, part in place], -1
                        )
                        array = gradients.reshape(-1, gradients.shape[-1]).float().numpy()
                        total = sums.setdefault(name, _Statistics(array.shape[1], self.draws, add))
                        total.add(array, weights.reshape(-1), first=draw == 0)
            self._keep("gradient", block, start, torch.stack(arriving))
        for name, total in sums.items():
            self.files.put(f"{name}.safetensors", partial(save_file, total.tensors(name)))

    def _run(self, block: int, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """One block's output for ``hidden``, with the other arguments that its model passes."""
        compute = self.layers[block].forward
        outputs: list[torch.Tensor] = []

        def forward_of(place: int) -> Callable[..., torch.Tensor]:
            def forward(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
                if place != block:
                    return _hidden(args, kwargs)
                kwargs.pop("hidden_states", None)
                outputs.append(compute(hidden, *args[1:], **kwargs))
                raise _Done

            return forward

        with _replaced(self.layers, forward_of), suppress(_Done):
            self.model.base_model(**inputs)
        return outputs[0]


class _Statistics:
    """The statistics of the gradients at one linear's output."""

    def __init__(self, width: int, draws: int, add: Callable[..., None] | None) -> None:
        self._sum = GramSum(width, add=add)
        self._draws = draws
        self._squares: list[NDArray[np.float64]] = []

    def add(
        self, gradients: NDArray[np.float32], weights: NDArray[np.float32], *, first: bool
    ) -> None:
        """Add gradients ``[tokens, N]``, of the first draw for these tokens or of a later one."""
        self._sum.add(gradients, weights)
        squares = np.einsum("tn,tn->t", gradients, gradients, dtype=np.float64)
        if first:
            self._squares.append(squares)
        else:
            self._squares[-1] += squares

    def tensors(self, name: str) -> dict[str, NDArray[np.float32]]:
        """The means in their stored form."""
        gram = self._sum.gram()
        if not np.isfinite(np.diag(gram.matrix)).all():
            raise ModelError(
                f"{name}: the gradient at its output over the calibration text holds NaN or Inf: "
                "the checkpoint or the text is damaged"
            )
        squares = np.concatenate(self._squares) / self._draws
        return {
            "output_gram": (gram.matrix / max(gram.tokens, 1.0)).astype(np.float32),
            "token_weights": squares.astype(np.float32),
        }


class _Done(Exception):  # noqa: N818 - no error: it ends a forward pass
    """Raised once the requested block has run."""


def _layers(model: PreTrainedModel, names: Sequence[str]) -> list[torch.nn.Module]:
    """The decoder blocks of the model that hold the linears ``names``."""
    path, _, _ = names[0].partition(f".{block_of(names[0])}.")
    blocks = dict(model.named_modules()).get(path)
    if not isinstance(blocks, torch.nn.ModuleList):
        raise ModelError(
            f"the eager model has no list of blocks {quoted(path)}, where {quoted(names[0])} "
            "should be"
        )
    return list(blocks)


def _use_fast_attention(model: PreTrainedModel) -> None:
    """Select fused attention where the model has it and its result is the same."""
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        with suppress(ValueError, ImportError):
            model.set_attn_implementation("sdpa")


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a decoder block."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


@contextmanager
def _replaced(
    layers: Sequence[torch.nn.Module], forward_of: Callable[[int], Callable[..., torch.Tensor]]
) -> Iterator[None]:
    """Replace the forward functions of the layers."""
    before = [layer.__dict__.get("forward") for layer in layers]
    for place, layer in enumerate(layers):
        layer.__dict__["forward"] = forward_of(place)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward


@contextmanager
def _recorded(modules: Iterator[Any]) -> Iterator[dict[Any, torch.Tensor]]:
    """The gradients at the outputs of ``modules``, of the last backward pass."""
    seen: dict[Any, torch.Tensor] = {}

    def hook(module: Any, _: Any, output: torch.Tensor) -> None:  # noqa: ANN401
        def note(gradient: torch.Tensor) -> None:
            seen[module] = gradient

        output.register_hook(note)  # type: ignore[no-untyped-call]

    handles = [module.register_forward_hook(hook) for module in set(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
