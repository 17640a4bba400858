"""Run a graph level by level, with the weights that the caller supplies.

The graph is cut at its linears and its attentions (:mod:`eoracc.compiler.sweep.cut`). Linears are
multiplied here, attention is computed by PyTorch, and the glue between them runs in ONNX Runtime
sessions made from the graph's own nodes. So one forward pass can show a pass every linear's input,
let it change the weight, and continue with the changed weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from eoracc.compiler.observe.spans import span
from eoracc.compiler.sweep.batch import Array, Batch, FactorsOf, Float, WeightOf
from eoracc.compiler.sweep.cut import (
    Segment,
    cut_graph,
    group_by_level,
    node_levels,
    segment_model,
)
from eoracc.compiler.sweep.products import attention, linear_products
from eoracc.errors import ModelError
from eoracc.passes.calibrate import Precision
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.plugins.op import Input

__all__ = ["Executor"]

_PARAMETER = re.compile(
    r"\.(weight|weight_t|dense_weight|bias|weight_packed|scales|zero_points|lora_[ab]|lora_[ab]_scale)$"
)
"""Initializers that are parameters of the model, by their names."""


class Executor:
    """Runs one graph level by level. Build it again after a pass that changes the glue.

    Attributes:
      linears: all linears in execution order.
      levels: groups of linears per level, in order.
      head_level: the level of the last linear, the language model head.
      precision: of the linears and of attention.
    """

    def __init__(
        self,
        model: ir.Model,
        linears: Sequence[Linear] | None = None,
        *,
        precision: Precision = "float32",
        cached: bool = False,
    ) -> None:
        """Cut ``model`` at its linears.

        Args:
          model: the graph.
          linears: their view, where the caller has it already.
          precision: of the linears and of attention.
          cached: compute attention by the graph's own nodes, read the cache that a batch continues
            and keep its new one.
        """
        self._model = model
        self.precision: Precision = precision
        self.linears = list(find_linears(model) if linears is None else linears)
        self._past = {
            value.name: _empty_past(value)
            for value in model.graph.inputs
            if str(value.name).startswith("past_key_values.")
        }
        levels = node_levels(model.graph, self.linears)
        self.levels = group_by_level(self.linears, levels)
        self.head_level = len(self.levels) - 1
        self._output_names = {linear: str(linear.node.outputs[0].name) for linear in self.linears}
        self._input_names = {linear: str(linear.input.name) for linear in self.linears}
        self._cached = cached
        kept = model.graph.outputs if cached else model.graph.outputs[:1]
        self._segments = cut_graph(model.graph, self.linears, levels, kept)
        self._sessions: dict[bytes, ort.InferenceSession] = {}

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters, those of compressed linears in tiles.

        Constants and tables do not count.
        """
        stored = sum(
            value.const_value.nbytes
            for name, value in self._model.graph.initializers.items()
            if value.const_value is not None and _PARAMETER.search(name)
        )
        return stored + sum(map(_padding_bytes, self.linears))

    def start(self, batches: Iterable[Batch]) -> None:
        """Compute everything before the first linears."""
        run = self._runner(0)
        for batch in batches:
            run(batch)

    def step(
        self,
        level: int,
        batches: Iterable[Batch],
        weight_of: WeightOf,
        factors_of: FactorsOf | None = None,
    ) -> None:
        """Compute the linears of ``level`` and everything before those of the next level.

        It goes batch by batch, so that wide outputs (a gate's, say) never exist for all tokens at
        once.

        Args:
          level: whose linears are computed; their inputs are in ``batches``.
          batches: changed in place.
          weight_of: gives the weights.
          factors_of: gives a low-rank term to add, which may differ from batch to batch.
        """
        groups = [
            (
                group.linears,
                linear_products([weight_of(linear) for linear in group.linears], self.precision),
            )
            for group in self.levels[level]
        ]
        run = self._runner(level + 1)
        for batch in batches:
            for linears, multiply in groups:
                inputs = self._input(linears[0], batch)
                rows = inputs.reshape(-1, inputs.shape[-1])
                products = multiply(rows)
                for linear, product in zip(linears, products, strict=True):
                    factors = None if factors_of is None else factors_of(linear, batch)
                    if factors is not None:
                        np.add(product, (rows @ factors.down().T) @ factors.up().T, out=product)
                    shaped = product.reshape(*inputs.shape[:-1], -1)
                    batch.values[self._output_names[linear]] = shaped
            run(batch)

    def inputs_of(self, group: LinearGroup, batch: Batch) -> Float:
        """The group's shared input in ``batch``, ``float32 [tokens, K]``."""
        inputs = self._input(group.linears[0], batch)
        return inputs.reshape(-1, inputs.shape[-1])

    def run_to_head(
        self,
        batches: Sequence[Batch],
        weight_of: WeightOf,
        factors_of: FactorsOf | None = None,
    ) -> None:
        """Run everything below the head; :meth:`head_input` is available afterwards."""
        self.start(batches)
        for level in range(self.head_level):
            self.step(level, batches, weight_of, factors_of)

    def head_input(self, batch: Batch) -> Float:
        """The input of the head, ``float32 [batch, sequence, hidden]``."""
        return self._input(self.levels[self.head_level][-1].linears[-1], batch)

    def logits(self, hidden: Float, weight: Float) -> Float:
        """Logits ``[batch, sequence, vocabulary]`` of head inputs ``[batch, sequence, hidden]``."""
        head = self.levels[self.head_level][-1].linears[-1]
        batch = Batch(np.ones(hidden.shape[:2], np.int64))
        multiply = linear_products([weight], self.precision)
        (product,) = multiply(hidden.reshape(-1, hidden.shape[-1]))
        batch.values[self._output_names[head]] = product.reshape(*hidden.shape[:-1], -1)
        self._runner(self.head_level + 1)(batch)
        return batch.values[str(self._model.graph.outputs[0].name)]  # type: ignore[return-value]

    def _runner(self, level: int) -> Callable[[Batch], None]:
        """A function that runs the segments of ``level`` on one batch."""
        segments = [
            (
                partial(self._attend, segment.nodes)
                if segment.is_attention and not self._cached
                else self._glue_runner(segment),
                segment.drop,
            )
            for segment in self._segments[level]
        ]

        def run(batch: Batch) -> None:
            for compute, drop in segments:
                compute(batch)
                for name in drop:
                    batch.values.pop(name, None)

        return run

    def _glue_runner(self, glue: Segment) -> Callable[[Batch], None]:
        output_names = [str(value.name) for value in glue.outputs]
        input_names = [str(value.name) for value in glue.inputs]
        constants = {
            str(value.name): np.ascontiguousarray(value.const_value.numpy())
            for value in glue.inputs
            if value.const_value is not None
        }
        session = self._session(glue) if glue.nodes else None

        def run(batch: Batch) -> None:
            if session is not None:
                # The session's own names are positions, in the order of glue.inputs.
                feeds = {
                    port.name: constants[name] if name in constants else self._value(batch, name)
                    for port, name in zip(session.get_inputs(), input_names, strict=True)
                }
                batch.values.update(zip(output_names, session.run(None, feeds), strict=True))

        return run

    def _attend(self, nodes: Sequence[ir.Node], batch: Batch) -> None:
        for node in nodes:
            # All float32, but for the mask, which may be bool and may be absent.
            query, key, value, mask, *_ = (
                cast("Any", None if operand is None else self._value(batch, str(operand.name)))
                for operand in (*node.inputs, None)
            )
            attributes = node.attributes
            batch.values[str(node.outputs[0].name)] = attention(
                query,
                key,
                value,
                mask,
                heads=attributes["q_num_heads"].as_int(),
                kv_heads=attributes["kv_num_heads"].as_int(),
                causal="is_causal" in attributes and bool(attributes["is_causal"].as_int()),
                scale=attributes["scale"].as_float() if "scale" in attributes else None,
                precision=self.precision,
            )

    def _input(self, linear: Linear, batch: Batch) -> Float:
        return batch.values[self._input_names[linear]]  # type: ignore[return-value]

    def _value(self, batch: Batch, name: str) -> Array:
        if name in batch.values:
            return batch.values[name]
        if batch.previous is not None:
            return batch.previous.values[name.replace("past_key_values", "present")]
        return self._past[name](len(batch.attention_mask))

    def _session(self, glue: Segment) -> ort.InferenceSession:
        """A session for the segment; blocks with equal glue share one and its memory arena."""
        proto = ir.to_proto(segment_model(glue, self._model)).SerializeToString(deterministic=True)
        if proto not in self._sessions:
            options = ort.SessionOptions()
            # NumPy's BLAS threads take turns with the session's: neither may burn cycles waiting.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3
            try:
                with span("open session", "session", nodes=len(glue.nodes)):
                    self._sessions[proto] = ort.InferenceSession(proto, options)
            except Exception as error:
                first, last = glue.nodes[0].name, glue.nodes[-1].name
                raise ModelError(
                    f"the nodes {first} … {last} cannot run in ONNX Runtime: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        return self._sessions[proto]


def _empty_past(value: ir.Value) -> Callable[[int], Array]:
    shape = value.shape
    if shape is None or value.dtype is None:
        raise ModelError(f"input {value.name} has no shape: it cannot be fed an empty cache")
    dims = [dim if isinstance(dim, int) else 0 for dim in shape]
    dtype = value.dtype.numpy()

    def empty(batch: int) -> Array:
        return np.zeros((batch, *dims[1:]), dtype)

    return empty


def _padding_bytes(linear: Linear) -> int:
    """What the operands of a compressed linear take in tiles beyond their bytes in the graph."""
    if linear.quantized is None:
        return 0
    factors = 0 if linear.factors is None else linear.factors.nbytes
    plain = sum(
        value.const_value.nbytes
        for place, value in enumerate(linear.node.inputs)
        if place != Input.bias and value is not None and value.const_value is not None
    )
    return linear.quantized.nbytes + factors - plain
