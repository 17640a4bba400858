"""Run the graph up to one linear after another, with whatever weights the caller chooses.

The graph is cut at its linears and its attentions. What lies between them (norms, rotary
embedding, activation functions) is glue: it runs in ONNX Runtime sessions made from the graph's own
nodes. So calibration sees every linear's input, can change its weight, and goes on through the
changed weight, in a single forward pass.

A node's *level* is the number of linears on the longest path to it. All glue of a level runs
once the linears of the level below are done; linears of a level that share an input form a group.
For a Llama block the levels are (q, k, v), (o), (gate, up), (down).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from eoracc.compiler.sweep.products import attention, linear_products
from eoracc.errors import ModelError
from eoracc.passes.calibrate import Precision
from eoracc.passes.graph.linears import Linear, LinearGroup, find_linears
from eoracc.plugins.functions.overload import local_function
from eoracc.plugins.op import DOMAIN
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.runtime.onnxruntime.session import token_positions

__all__ = ["Batch", "Executor", "FactorsOf", "WeightOf", "make_batches"]

Array = NDArray[np.generic]
Float = NDArray[np.float32]
WeightOf = Callable[[Linear], Float]
FactorsOf = Callable[[Linear, "Batch"], LowRank | None]

_PARAMETER = re.compile(
    r"\.(weight|weight_t|bias|weight_packed|scales|zero_points|lora_[ab]|lora_[ab]_scale)$"
)
"""Initializers that are parameters of the model, by their names."""

_INLINE_ELEMENTS = 16
"""Initializers above this size are fed to a glue session: small ones are shapes and axes, which
ONNX Runtime folds; large ones are weights, which differ from block to block."""


@dataclass(eq=False)
class Batch:
    """A batch of token windows and the values that are alive at the level reached.

    Attributes:
      attention_mask: ``int64 [batch, sequence]``, 0 for padding.
      values: by value name; graph inputs at first.
      weights: ``float32 [batch]``, what each token of a window counts for; None for 1.
    """

    attention_mask: NDArray[np.int64]
    values: dict[str, Array] = field(default_factory=dict)
    weights: Float | None = None

    @property
    def token_weights(self) -> Float:
        """The weight of each token, 0 for padding, ``float32 [batch * sequence]``."""
        weights = self.attention_mask.astype(np.float32)
        if self.weights is not None:
            weights *= self.weights[:, None]
        return weights.reshape(-1)


def make_batches(
    input_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    *,
    size: int,
    weights: Float | None = None,
) -> list[Batch]:
    """Cut windows ``[samples, sequence]`` into batches of at most ``size``, graph inputs set."""
    batches = []
    for start in range(0, len(input_ids), size):
        mask = attention_mask[start : start + size]
        values: dict[str, Array] = {
            "input_ids": input_ids[start : start + size],
            "attention_mask": mask,
            "position_ids": token_positions(mask),
        }
        part = None if weights is None else weights[start : start + size]
        batches.append(Batch(mask, values, part))
    return batches


@dataclass(eq=False)
class _Stage:
    """Nodes that run at once, the values that they take, and those they must keep for later ones.

    It is either glue, any nodes but linears and attentions, or attentions alone.
    """

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    drop: list[str]

    @property
    def is_attention(self) -> bool:
        return bool(self.nodes) and _computed_here(self.nodes[0])


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
    ) -> None:
        """Cut ``model`` at its linears.

        Args:
          model: the graph.
          linears: their view, where the caller has it already.
          precision: of the linears and of attention.
        """
        self._model = model
        self.precision: Precision = precision
        self.linears = list(find_linears(model) if linears is None else linears)
        self._past = {
            value.name: _empty_past(value)
            for value in model.graph.inputs
            if str(value.name).startswith("past_key_values.")
        }
        levels = _levels(model.graph, self.linears)
        self.head_level = max(levels[linear.node] for linear in self.linears)
        self.levels: list[list[LinearGroup]] = [[] for _ in range(self.head_level + 1)]
        for linear in self.linears:
            self._place(linear, levels[linear.node])
        self._output_names = {linear: str(linear.node.outputs[0].name) for linear in self.linears}
        self._input_names = {linear: str(linear.input.name) for linear in self.linears}
        self._stages = self._cut(levels)
        self._sessions: dict[bytes, ort.InferenceSession] = {}

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters as the graph stores them; constants and tables are none."""
        return sum(
            value.const_value.nbytes
            for name, value in self._model.graph.initializers.items()
            if value.const_value is not None and _PARAMETER.search(name)
        )

    def start(self, batches: Iterable[Batch]) -> None:
        """Compute what stands before the first linears."""
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
        """Compute the linears of ``level`` and what stands before those of the next level.

        The weights are what ``weight_of`` gives; ``factors_of`` may add a low-rank term that
        differs from batch to batch. It goes batch by batch, so that wide outputs (a gate's, say)
        never exist for all tokens at once.
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
        """Run everything below the last linear, so that :meth:`head_input` is there."""
        self.start(batches)
        for level in range(self.head_level):
            self.step(level, batches, weight_of, factors_of)

    def head_input(self, batch: Batch) -> Float:
        """What the head multiplies, ``float32 [batch, sequence, hidden]``."""
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
        """What computes, for one batch, all that stands before the linears of ``level``."""
        stages = [
            (
                partial(self._attend, stage.nodes)
                if stage.is_attention
                else self._glue_runner(stage),
                stage.drop,
            )
            for stage in self._stages[level]
        ]

        def run(batch: Batch) -> None:
            for compute, drop in stages:
                compute(batch)
                for name in drop:
                    batch.values.pop(name, None)

        return run

    def _glue_runner(self, glue: _Stage) -> Callable[[Batch], None]:
        names = [str(value.name) for value in glue.outputs]
        taken = [str(value.name) for value in glue.inputs]
        fixed = {
            str(value.name): np.ascontiguousarray(value.const_value.numpy())
            for value in glue.inputs
            if value.const_value is not None
        }
        session = self._session(glue) if glue.nodes else None

        def run(batch: Batch) -> None:
            if session is not None:
                # The session's own names are positions, in the order of glue.inputs.
                feeds = {
                    port.name: fixed[name] if name in fixed else self._value(batch, name)
                    for port, name in zip(session.get_inputs(), taken, strict=True)
                }
                batch.values.update(zip(names, session.run(None, feeds), strict=True))

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

    def _place(self, linear: Linear, level: int) -> None:
        groups = self.levels[level]
        for i, group in enumerate(groups):
            if group.linears[0].input is linear.input:
                groups[i] = LinearGroup((*group.linears, linear))
                return
        groups.append(LinearGroup((linear,)))

    def _value(self, batch: Batch, name: str) -> Array:
        past = self._past.get(name)
        return batch.values[name] if past is None else past(len(batch.attention_mask))

    def _cut(self, levels: Mapping[ir.Node, int]) -> list[list[_Stage]]:
        """The stages of each level, in order."""
        graph = self._model.graph
        of_linear = {linear.node for linear in self.linears}
        # The Transpose of a tied head's embedding: weight_of() stands for what it makes.
        operands = {linear.node.inputs[1].producer() for linear in self.linears}  # type: ignore[union-attr]
        places = _places(graph, levels, of_linear | operands)
        # Stages that hold no node are there too: every level begins with one.
        order = sorted({*places.values(), *((level, 0) for level in range(self.head_level + 2))})
        rank = {place: position for position, place in enumerate(order)}
        logits = graph.outputs[0]
        # A value lives until the last stage that reads it; the logits live on.
        needed: dict[ir.Value, int] = {logits: len(order)}
        members: dict[tuple[int, int], list[ir.Node]] = defaultdict(list)
        for node in graph:
            if node in of_linear:
                value = node.inputs[0]
                # A linear reads its input after all stages of its level have run.
                readers = [(value, rank[levels[node] + 1, 0])]
            elif node in operands:
                continue
            else:
                members[places[node]].append(node)
                readers = [(value, rank[places[node]]) for value in node.inputs]
            for value, until in readers:
                if value is not None:
                    needed[value] = max(needed.get(value, 0), until)
        stages: list[list[_Stage]] = [[] for _ in range(self.head_level + 2)]
        for place, position in rank.items():
            nodes = members[place]
            made = {output for node in nodes for output in node.outputs}
            taken = dict.fromkeys(
                value
                for node in nodes
                for value in node.inputs
                if value is not None and value not in made and not _inlined(value)
            )
            kept = [v for n in nodes for v in n.outputs if needed.get(v, -1) > position]
            dead = [str(v.name) for v, until in needed.items() if until == position]
            stages[place[0]].append(_Stage(nodes, list(taken), kept, dead))
        return stages

    def _session(self, glue: _Stage) -> ort.InferenceSession:
        """A session for the level; blocks whose glue is alike share one, arena and all."""
        proto = ir.to_proto(_standalone(glue, self._model)).SerializeToString(deterministic=True)
        if proto not in self._sessions:
            options = ort.SessionOptions()
            # NumPy's BLAS threads take turns with the session's: neither may burn cycles waiting.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.log_severity_level = 3
            try:
                self._sessions[proto] = ort.InferenceSession(proto, options)
            except Exception as error:
                first, last = glue.nodes[0].name, glue.nodes[-1].name
                raise ModelError(
                    f"the nodes {first} … {last} cannot run in ONNX Runtime: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        return self._sessions[proto]


def _standalone(glue: _Stage, parent: ir.Model) -> ir.Model:
    """The level as a model of its own, its values named by position and not by block."""
    copies: dict[str, ir.Value] = {}

    def copy(value: ir.Value) -> ir.Value:
        # Looked up by name: compression may have replaced a value since the graph was cut.
        name = str(value.name)
        if name not in copies:
            copies[name] = ir.Value(
                name=f"v{len(copies)}",
                type=value.type,
                shape=value.shape,
                const_value=value.const_value if _inlined(value) else None,
            )
        return copies[name]

    inputs = [copy(value) for value in glue.inputs]
    nodes = [
        ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copy(value) for value in node.inputs],
            node.attributes.values(),
            outputs=[copy(value) for value in node.outputs],
            name=f"n{position}",
        )
        for position, node in enumerate(glue.nodes)
    ]
    functions = {}
    for node in nodes:
        if node.domain == DOMAIN:
            function = local_function(node)
            node.overload = function.overload
            functions[function.identifier()] = function
    constants = dict.fromkeys(
        copy(value)
        for node in glue.nodes
        for value in node.inputs
        if value is not None and _inlined(value)
    )
    graph = ir.Graph(
        inputs,
        [copy(value) for value in glue.outputs],
        nodes=nodes,
        initializers=list(constants),
        opset_imports=dict(parent.graph.opset_imports),
        name="glue",
    )
    return ir.Model(graph, ir_version=parent.ir_version, functions=list(functions.values()))


def _levels(graph: ir.Graph, linears: Sequence[Linear]) -> dict[ir.Node, int]:
    """Number of linears on the longest path to each node (a linear does not count itself)."""
    of_linear = {linear.node for linear in linears}
    levels: dict[ir.Node, int] = {}
    for node in graph:
        level = 0
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                level = max(level, levels[producer] + (producer in of_linear))
        levels[node] = level
    return levels


def _places(
    graph: ir.Graph, levels: Mapping[ir.Node, int], elsewhere: Collection[ir.Node | None]
) -> dict[ir.Node, tuple[int, int]]:
    """The level and the stage within it of each node: even stages are glue, odd ones attention.

    Nodes ``elsewhere``, those that no stage computes, have none.
    """
    places: dict[ir.Node, tuple[int, int]] = {}
    for node in graph:
        if node in elsewhere:
            continue
        level, stage = levels[node], 0
        attends = _computed_here(node)
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer not in places or places[producer][0] != level:
                continue
            before = places[producer][1]
            stage = max(stage, before + (before % 2))
        places[node] = (level, stage + attends)
    return places


def _computed_here(node: ir.Node) -> bool:
    """Whether ``node`` is an attention of the kind that :func:`attention` computes."""
    return (
        node.op_type == "Attention"
        and node.domain == ""
        and "q_num_heads" in node.attributes
        and ("softcap" not in node.attributes or not node.attributes["softcap"].as_float())
        and not any(output.uses() for output in node.outputs[1:])
    )


def _inlined(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size <= _INLINE_ELEMENTS


def _empty_past(value: ir.Value) -> Callable[[int], Array]:
    shape = value.shape
    if shape is None or value.dtype is None:
        raise ModelError(f"input {value.name} has no shape: it cannot be fed an empty cache")
    dims = [dim if isinstance(dim, int) else 0 for dim in shape]
    dtype = value.dtype.numpy()

    def empty(batch: int) -> Array:
        return np.zeros((batch, *dims[1:]), dtype)

    return empty
