"""A view of the graph's token embeddings, the other large weights that can be quantized."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from eoracc.errors import PassError
from eoracc.passes.graph.linears import Linear
from eoracc.passes.graph.names import TOKENS
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.op import DOMAIN, DOMAIN_VERSION, GATHER_OP

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["Embedding", "find_embeddings"]


@dataclass(eq=False)
class Embedding:
    """One table that rows are gathered from.

    Attributes:
      name: module name as in the checkpoint, ``model.embed_tokens``.
      node: the ``Gather`` that computes it now.
      source: the original table, ``[rows, width]``; read lazily.
      of_tokens: whether tokens look it up, and not positions or token types.
      compressed: the table after quantization.
      plan: options that a survey decided for this table, by the option's name.
      output_gram: loads ``G``, ``float32 [width, width]``, a survey's weights of errors of what
        enters the first decoder block: of a row times :attr:`scale`.
    """

    name: str
    node: ir.Node
    source: ir.TensorProtocol
    of_tokens: bool = True
    compressed: NBitsWeight | None = None
    plan: dict[str, Any] = field(default_factory=dict)
    output_gram: Callable[[], NDArray[np.float32]] | None = None

    @property
    def block(self) -> None:
        """None: embeddings are outside of the decoder blocks; see :attr:`Linear.block`."""
        return None

    @property
    def known_as(self) -> tuple[str, ...]:
        """Names that a pattern may match; see :attr:`Linear.known_as`."""
        return (self.name,)

    @property
    def scale(self) -> float:
        """The constant that rows are multiplied with after they are looked up (Gemma's); else 1."""
        uses = [use.node for value in self.node.outputs for use in value.uses()]
        if len(uses) != 1 or uses[0].op_type != "Mul":
            return 1.0
        constants = [value.const_value for value in uses[0].inputs if value is not None]
        scales = [tensor for tensor in constants if tensor is not None and tensor.size == 1]
        return float(scales[0].numpy().reshape(())) if scales else 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of the table."""
        rows, width = (int(size) for size in self.source.shape.numpy())
        return rows, width

    def weight(self) -> NDArray[np.float32]:
        """The original table, ``float32 [rows, width]``."""
        return np.asarray(self.source.numpy(), np.float32)

    def quantize(self, weight: NBitsWeight, *, tied: Linear | None = None) -> None:
        """Put ``eoracc::GatherNBits(indices, B, scales, zero_points?)`` in place of the Gather.

        What follows the Gather (Gemma's scale) stays.

        Args:
          weight: the quantized table.
          tied: a head that multiplies with the same ``weight``: its stored operands are shared.

        Raises:
          PassError: ``weight`` has another shape, or ``tied`` has another weight.
        """
        rows, width = self.shape
        if (weight.out_features, weight.in_features) != (rows, width):
            raise PassError(
                self.name,
                f"a [{weight.out_features}, {weight.in_features}] table cannot replace "
                f"[{rows}, {width}]",
            )
        if tied is not None and tied.compressed is not weight:
            raise PassError(self.name, f"{tied.name} is not quantized with the same weight")
        table, indices = self.node.inputs
        operands = self._store(weight) if tied is None else _shared(tied)
        graph = self.node.graph
        assert graph is not None and table is not None  # noqa: PT018, S101 - found in a graph
        replaced = self.node
        self.compressed = weight
        self.node = ir.node(
            GATHER_OP,
            [indices, *operands],
            {
                "K": weight.in_features,
                "N": rows,
                "bits": weight.bits,
                "block_size": weight.group_size,
            },
            domain=DOMAIN,
            name=self.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, replaced, [replaced], [self.node], replaced.outputs, self.node.outputs
        )
        graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
        if not table.uses():
            del graph.initializers[str(table.name)]

    def _store(self, weight: NBitsWeight) -> list[ir.Value]:
        graph = self.node.graph
        assert graph is not None  # noqa: S101 - found in a graph
        parts: dict[str, NDArray[np.generic] | None] = {
            "weight_packed": weight.packed,
            "scales": weight.scales,
            "zero_points": weight.zero_points,
        }
        return [
            register_tensor(graph, ir.tensor(array, name=f"{self.name}.{part}"))
            for part, array in parts.items()
            if array is not None
        ]


def find_embeddings(model: ir.Model) -> list[Embedding]:
    """All embeddings of ``model`` that are not quantized, in execution order."""
    embeddings = []
    for node in model.graph:
        if node.op_type != "Gather" or node.domain != "":
            continue
        table = node.inputs[0]
        # Cosine and sine tables are no parameters.
        if table is None or table.const_value is None or not str(table.name).endswith(".weight"):
            continue
        if node.attributes.get_int("axis", 0) != 0 or len(table.const_value.shape) != 2:
            continue
        indices = node.inputs[1]
        embeddings.append(
            Embedding(
                name=str(table.name).removesuffix(".weight"),
                node=node,
                source=table.const_value,
                of_tokens=indices is not None and indices.name == TOKENS,
            )
        )
    return embeddings


def _shared(tied: Linear) -> list[ir.Value]:
    # B, scales and zero points follow the first input of both ops.
    return [value for value in tied.node.inputs[1:4] if value is not None]
