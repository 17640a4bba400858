"""A view of the graph's weight matmuls, the unit of compression.

A linear is a ``MatMul`` whose right operand is an initializer (possibly through a ``Transpose``),
or what compression put in its place: ``eoracc::MatMulNBitsLowRank`` for codes, a ``MatMul`` or
``eoracc::MatMulLowRank`` for floats. The view writes through:
:meth:`Linear.quantize`, :meth:`Linear.compensate` and :meth:`Linear.factorize` change the graph at
once, so that the graph is the only record of what is compressed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.errors import ModelError, PassError
from eoracc.passes.graph.record import LinearRecord
from eoracc.passes.graph.stored import (
    DENSE_WEIGHT,
    dense_weight,
    factor_arrays,
    stored_factors,
    stored_weight,
)
from eoracc.plugins.op import DENSE_OP, DOMAIN, DOMAIN_VERSION, FUSED_OP, Input
from eoracc.plugins.operands.dense import DenseWeight, StoredWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

if TYPE_CHECKING:
    from eoracc.passes.graph.imported import ImportedWeight
    from eoracc.passes.solvers.gram import Activations, Gram, GramProducts
    from eoracc.passes.solvers.sparsity import Mask, Sparsity

__all__ = [
    "Factorized",
    "Linear",
    "LinearGroup",
    "Pruner",
    "Quantizer",
    "block_of",
    "find_again",
    "find_linears",
]

_BLOCK = re.compile(r"(?:^|\.)(?:layers|blocks|h|layer)\.(\d+)\.")


def block_of(name: str) -> int | None:
    """Index of the decoder block that holds the module ``name``, None outside of one.

    >>> block_of("model.layers.3.self_attn.q_proj"), block_of("lm_head")
    (3, None)
    """
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


@dataclass(frozen=True, eq=False)
class Factorized:
    """A weight as a product of two, ``W ~ u v``.

    The arrays are transposed views of the graph's tensors.

    Attributes:
      u: ``float32 [N, r]``.
      v: ``float32 [r, K]``.
    """

    u: NDArray[np.float32]
    v: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """``r``."""
        return len(self.v)

    def product(self) -> NDArray[np.float32]:
        """``u v``, ``float32 [N, K]``."""
        return self.u @ self.v


class Quantizer(Protocol):
    """A compressing pass that can compress another weight with the same options."""

    def requantize(self, weight: NDArray[np.float32], gram: Gram) -> StoredWeight:
        """Compress ``weight [N, K]``, whose input has the Gram ``gram``."""


class Pruner(Protocol):
    """A pruning pass whose choice a quantizing pass keeps to."""

    @property
    def run(self) -> int:
        """Columns that a joint solve must keep together; 0 for all, in the order of the row."""

    def prune(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        """``weight [N, K]`` with exact zeros for what is removed; other weights may change."""

    def choice(self, weight: NDArray[np.float32], gram: Gram | None) -> Sparsity | Mask:
        """What to remove of ``weight [N, K]``: a mask, or how much a joint solve is to remove."""


@dataclass(eq=False)
class Linear:
    """One weight matmul of the graph.

    Attributes:
      name: module name as in the checkpoint, ``model.layers.0.self_attn.q_proj``.
      node: the node that computes it now.
      in_features: ``K``.
      out_features: ``N``.
      source: the original weight; read lazily, None if the graph was loaded in compressed form.
      transposed: whether ``source`` is stored ``[K, N]`` rather than ``[N, K]``.
      compressed: the weight after quantization or pruning.
      quantizer: the pass that compressed it in this sweep, with the options for this linear.
      pruner: the pass that pruned it in this sweep, with the options for this linear.
      factors: its low-rank compensation.
      factorized: the weight after factorisation. The graph then holds two matmuls, which
        :func:`find_again` returns as linears of their own, ``<name>.v`` and ``<name>.u``.
      whole: the linear that this one is a factor of; None for one of the checkpoint.
      plan: options that a survey decided for this linear, by the option's name.
      output_gram: loads ``G``, ``float32 [N, N]``, a survey's weights of output errors.
      token_weights: loads a survey's ``||g||^2`` of the gradient at the output, for each token of
        the calibration text, padding included: ``float32 [tokens]``.
      tied: whether an embedding looks up the rows of the same weight.
      imported: loads the weight of the checkpoint that is to be taken over; None where there is
        none, or where that checkpoint has the original weight.
      record: errors and notes for the report.
    """

    name: str
    node: ir.Node
    in_features: int
    out_features: int
    source: ir.TensorProtocol | None
    transposed: bool
    compressed: StoredWeight | None = None
    quantizer: Quantizer | None = None
    pruner: Pruner | None = None
    factors: LowRank | None = None
    factorized: Factorized | None = None
    whole: Linear | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    output_gram: Callable[[], NDArray[np.float32]] | None = None
    token_weights: Callable[[], NDArray[np.float32]] | None = None
    tied: bool = False
    imported: Callable[[], ImportedWeight] | None = None
    record: LinearRecord = field(default_factory=LinearRecord)

    @property
    def block(self) -> int | None:
        """Index of the decoder block, None outside of one (``lm_head``)."""
        return block_of(self.name)

    @property
    def role(self) -> str:
        """Last part of the name: ``q_proj``; of a factor ``q_proj.v`` or ``q_proj.u``."""
        role = self.name.rpartition(".")[2]
        return role if self.whole is None else f"{self.whole.role}.{role}"

    @property
    def known_as(self) -> tuple[str, ...]:
        """Names that a pattern may match: its own, and that of the weight it is a factor of."""
        return (self.name,) if self.whole is None else (self.name, self.whole.name)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that compute it, in order: two matmuls once it is factorised, one otherwise."""
        if self.factorized is None:
            return (self.node,)
        first = self.input.producer()
        assert first is not None  # noqa: S101 - factorize() has put it there
        return first, self.node

    @property
    def input(self) -> ir.Value:
        """The value that the linear multiplies."""
        value = self.node.inputs[Input.X]
        assert value is not None  # noqa: S101 - a MatMul always has its first input
        return value

    @property
    def quantized(self) -> NBitsWeight | None:
        """The weight in codes; None where it is stored in floats."""
        return self.compressed if isinstance(self.compressed, NBitsWeight) else None

    def weight(self) -> NDArray[np.float32]:
        """The original weight, ``float32 [N, K]``, freshly read.

        Raises:
          ModelError: the checkpoint holds NaN or Inf there.
        """
        if self.source is None:
            raise PassError(self.name, "the graph was loaded compressed: its weight is gone")
        stored = self.source.numpy()
        weight = np.ascontiguousarray(stored.T if self.transposed else stored, dtype=np.float32)
        if not np.isfinite(weight).all():
            raise ModelError(
                f"{self.name}.weight holds NaN or Inf: the checkpoint is damaged, fetch it again"
            )
        return weight

    def backbone_weight(self) -> NDArray[np.float32]:
        """The present weight without its low-rank part, ``float32 [N, K]``."""
        if self.factorized is not None:
            return self.factorized.product()
        return self.weight() if self.compressed is None else self.compressed.dequantize()

    def effective_weight(self) -> NDArray[np.float32]:
        """The present weight with its low-rank part, ``float32 [N, K]``."""
        weight = self.backbone_weight()
        return weight if self.factors is None else weight + self.factors.product()

    def quantize(self, weight: StoredWeight) -> None:
        """Put a compressed ``weight`` in place of the present one.

        Codes are multiplied by the fused op, floats by a MatMul.
        """
        if (weight.out_features, weight.in_features) != (self.out_features, self.in_features):
            raise PassError(
                self.name,
                f"a [{weight.out_features}, {weight.in_features}] weight cannot replace "
                f"[{self.out_features}, {self.in_features}]",
            )
        if self.factorized is not None:
            raise PassError(
                self.name,
                "has been factorised in this sweep: put another 'calibrate' before the pass that "
                "quantizes, which then finds the two factors as linears",
            )
        self.compressed = weight
        self._rewrite()

    def factorize(self, u: NDArray[np.float32], v: NDArray[np.float32]) -> None:
        """Put two matmuls, ``v`` and then ``u``, in place of the current node.

        Args:
          u: ``float32 [N, r]``.
          v: ``float32 [r, K]``.

        Raises:
          PassError: the factors do not fit or are not finite, or the linear is compressed already
            or outside the decoder blocks.
        """
        if (len(u), v.shape[1], u.shape[1]) != (self.out_features, self.in_features, len(v)):
            raise PassError(
                self.name,
                f"factors {list(u.shape)} and {list(v.shape)} cannot replace "
                f"[{self.out_features}, {self.in_features}]",
            )
        if not (np.isfinite(u).all() and np.isfinite(v).all()):
            raise PassError(
                self.name, "its factors hold NaN or Inf: its weight or its gram is out of scale"
            )
        if self.block is None:
            raise PassError(
                self.name,
                "stands outside the decoder blocks, where nothing is factorised: "
                "take the pattern that names it out of 'overrides'",
            )
        if self.whole is not None:
            raise PassError(self.name, "is a factor already: keep one factorising pass")
        if self.compressed is not None or self.factorized is not None:
            raise PassError(
                self.name, "is compressed already: factorise it before anything else is done to it"
            )
        stored_u, stored_v = (np.ascontiguousarray(factor.T) for factor in (u, v))
        self.factorized = Factorized(stored_u.T, stored_v.T)
        replaced, stale = self.node, tuple(self.node.inputs[1:])
        first = ir.node(
            "MatMul", [self.input, self._initializer("v.weight", stored_v)], name=f"{self.name}.v"
        )
        (inner,) = first.outputs
        inner.name = f"{self.name}.v.output"
        inner.type = self.input.type
        if self.input.shape is not None:
            inner.shape = ir.Shape([*self.input.shape[:-1], len(v)])
        second = ir.node(
            "MatMul", [inner, self._initializer("u.weight", stored_u)], name=f"{self.name}.u"
        )
        graph = self._graph
        ir.convenience.replace_nodes_and_values(
            graph, replaced, [replaced], [first, second], replaced.outputs, second.outputs
        )
        self.node = second
        _drop_unused_initializers(graph, stale)

    def hold_factors(self, factorized: Factorized) -> None:
        """Replace :attr:`factorized` by ``factorized``, which has the same values.

        The factors of a large model take as much memory as most of its weights. Once they are on
        disk, arrays mapped from there replace them.
        """
        assert self.factorized is not None  # noqa: S101 - only of what has been factorised
        self.factorized = factorized
        first, second = self.nodes
        for node, factor in ((first, factorized.v), (second, factorized.u)):
            value = node.inputs[1]
            assert value is not None  # noqa: S101 - a MatMul always has two inputs
            value.const_value = ir.tensor(factor.T, name=value.name)

    def compensate(self, factors: LowRank | None) -> None:
        """Set the low-rank factors of the linear; None removes them."""
        if self.compressed is None:
            raise PassError(self.name, "is not compressed: there is nothing to compensate")
        self.factors = factors
        self._rewrite()

    def _rewrite(self) -> None:
        weight = self.compressed
        assert weight is not None  # noqa: S101 - both callers have just checked
        node = self._dense_node(weight) if isinstance(weight, DenseWeight) else self._node(weight)
        graph, replaced, stale = self._graph, self.node, tuple(self.node.inputs[1:])
        self.node = node
        ir.convenience.replace_nodes_and_values(
            graph, replaced, [replaced], [node], replaced.outputs, node.outputs
        )
        if node.domain:
            graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
        _drop_unused_initializers(graph, stale)

    def _dense_node(self, weight: DenseWeight) -> ir.Node:
        operands = [self.input, self._initializer(DENSE_WEIGHT, weight.values.T)]
        if self.factors is None:
            return ir.node("MatMul", operands, name=self.name)
        operands += self._factor_operands()
        while operands[-1] is None:
            operands.pop()
        return ir.node(DENSE_OP, operands, domain=DOMAIN, name=self.name)

    def _factor_operands(self) -> list[ir.Value | None]:
        parts = {} if self.factors is None else factor_arrays(self.factors)
        return [
            self._initializer(part, parts.get(part))
            for part in ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")
        ]

    def _node(self, weight: NBitsWeight) -> ir.Node:
        operands: list[ir.Value | None] = [
            self.input,
            self._initializer("weight_packed", weight.packed),
            self._initializer("scales", weight.scales),
            self._initializer("zero_points", weight.zero_points),
            None,
            *self._factor_operands(),
        ]
        while operands[-1] is None:
            operands.pop()
        return ir.node(
            FUSED_OP,
            operands,
            {
                "K": self.in_features,
                "N": self.out_features,
                "bits": weight.bits,
                "block_size": weight.group_size,
                "accuracy_level": 0,
            },
            domain=DOMAIN,
            name=self.name,
        )

    @property
    def _graph(self) -> ir.Graph:
        graph = self.node.graph
        assert isinstance(graph, ir.Graph)  # noqa: S101 - linears are found in graphs
        return graph

    def _initializer(self, part: str, array: NDArray[np.generic] | None) -> ir.Value | None:
        graph = self._graph
        name = f"{self.name}.{part}"
        graph.initializers.pop(name, None)
        if array is None:
            return None
        value = ir.Value(
            name=name,
            const_value=ir.tensor(np.ascontiguousarray(array), name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        graph.register_initializer(value)
        return value


@dataclass(eq=False)
class LinearGroup:
    """Linears that share one input, and with it one Gram.

    Attributes:
      linears: in graph order.
      activations: the shared input over the calibration text, behind the present prefix.
      originals: the same tokens' input in the original model; None if no pass needs it.
      held_out: the shared input over text that nothing is solved on, to check factors with; None
        where there is none.
      held_out_originals: the same tokens' input in the original model; None if no pass needs it.
      gram: set by ``calibrate``; None before.
      products: multiplies activations for ``calibrate`` in the precision of the forward pass; None
        for float32.
    """

    linears: tuple[Linear, ...]
    activations: Activations | None = None
    originals: Activations | None = None
    gram: Gram | None = None
    products: GramProducts | None = None
    held_out: Activations | None = None
    held_out_originals: Activations | None = None

    def forget_inputs(self) -> None:
        """Let go of everything that was shown or computed of the shared input."""
        self.activations = self.originals = self.gram = None
        self.held_out = self.held_out_originals = None

    @property
    def name(self) -> str:
        """Names of the members, for messages."""
        return ", ".join(linear.name for linear in self.linears)


def find_linears(model: ir.Model) -> list[Linear]:
    """All linears of ``model`` in execution order."""
    linears = []
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type == FUSED_OP:
            linears.append(_from_fused(node))
        elif node.domain == DOMAIN and node.op_type == DENSE_OP:
            linears.append(_from_dense(node))
        elif node.domain == "" and node.op_type == "MatMul":
            linear = _from_matmul(node)
            if linear is not None:
                linears.append(linear)
    return linears


def find_again(model: ir.Model, before: Sequence[Linear]) -> list[Linear]:
    """All linears of ``model``; a factorised one is replaced by its two factors.

    Args:
      model: the graph.
      before: its linears so far. Those that are still one matmul are returned unchanged. The
        factors of the others have them as their :attr:`Linear.whole` and inherit a survey's
        weights of their outputs, but not its plan.
    """
    wholes: dict[ir.Node, Linear] = {}
    known: dict[ir.Node, Linear] = {}
    for linear in before:
        if linear.factorized is None:
            known[linear.node] = linear
        else:
            wholes |= dict.fromkeys(linear.nodes, linear)
    linears = find_linears(model)
    for linear in linears:
        whole = wholes.get(linear.node)
        if whole is not None:
            linear.whole = whole
            # At z = v x the only weights known of the tokens are those of u's output.
            linear.token_weights = whole.token_weights
            linear.output_gram = _factors_output_gram(linear, whole)
    return [known.get(linear.node, linear) for linear in linears]


def _factors_output_gram(linear: Linear, whole: Linear) -> Callable[[], NDArray[np.float32]] | None:
    """The weights of a factor's output errors: ``G`` behind ``u``, ``u^T G u`` between the two."""
    load, product = whole.output_gram, whole.factorized
    if load is None or product is None or linear.node is whole.node:
        return load

    def between() -> NDArray[np.float32]:
        weighed = product.u.T @ load() @ product.u
        return weighed.astype(np.float32)

    return between


def _from_matmul(node: ir.Node) -> Linear | None:
    operand = node.inputs[1]
    if operand is None:
        return None
    if dense_weight(node) is not None:
        return _from_dense(node)
    transposed = True
    producer = operand.producer()
    if producer is not None and producer.op_type == "Transpose":
        operand, transposed = producer.inputs[0], False
    if operand is None or operand.const_value is None or len(operand.const_value.shape) != 2:
        return None
    source = operand.const_value
    rows, columns = (int(size) for size in source.shape.numpy())
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    return Linear(
        name=_module_name(node, operand),
        node=node,
        in_features=in_features,
        out_features=out_features,
        source=source,
        transposed=transposed,
        tied=_is_tied(operand),
    )


def _from_fused(node: ir.Node) -> Linear:
    if node.attributes.get_int("layout", 0):
        raise ModelError(f"node {node.name}: is stored in tiles, as only a lowered graph is")

    in_features, out_features = (node.attributes[key].as_int() for key in ("K", "N"))
    return Linear(
        name=str(node.name),
        node=node,
        in_features=in_features,
        out_features=out_features,
        source=None,
        transposed=False,
        compressed=stored_weight(node),
        factors=stored_factors(node),
    )


def _from_dense(node: ir.Node) -> Linear:
    weight = dense_weight(node)
    if weight is None:
        raise ModelError(f"node {node.name}: its weight is not an initializer, so it is no linear")
    return Linear(
        name=str(node.name),
        node=node,
        in_features=weight.in_features,
        out_features=weight.out_features,
        source=None,
        transposed=False,
        compressed=weight,
        factors=stored_factors(node) if node.op_type == DENSE_OP else None,
    )


def _is_tied(weight: ir.Value) -> bool:
    return any(use.node.op_type == "Gather" for use in weight.uses())


def _module_name(node: ir.Node, weight: ir.Value) -> str:
    # A tied head multiplies with the embedding: its module is named by the node alone.
    if _is_tied(weight) or weight.name is None:
        return str(node.name).split("/")[0].removeprefix("v_")
    return weight.name.removesuffix("_t").removesuffix(".weight")


def _drop_unused_initializers(graph: ir.Graph, candidates: Sequence[ir.Value | None]) -> None:
    for value in candidates:
        operand = value
        producer = None if value is None else value.producer()
        if value is not None and producer is not None and producer.op_type == "Transpose":
            operand = producer.inputs[0]
            if not value.uses():
                graph.remove(producer, safe=True)
        # By identity: a replaced operand and its replacement have the same name.
        if operand is None or operand.name is None or operand.uses():
            continue
        if graph.initializers.get(operand.name) is operand:
            del graph.initializers[operand.name]
