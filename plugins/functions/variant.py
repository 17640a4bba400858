"""The properties by which the bodies of an op differ, and the name of the overload."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from eoracc.errors import PluginError
from eoracc.plugins.op import ACTIVATIONS, DENSE_OP, GATHER_OP, Input
from eoracc.plugins.operands.codes import BITS, TILE

__all__ = ["Variant"]

_OVERLOAD_PARTS = {
    "zero_points": "zeros",
    "bias": "bias",
    "lora_a": "lora",
    "lora_a_scale": "ascale",
    "lora_b_scale": "bscale",
    "norm_weight": "norm",
    "residual": "residual",
    "adapter_a": "slot",
    "adapter_b_scale": "slotscale",
}
"""Words of an overload's name by optional input; other inputs always accompany one of these."""


@dataclass(frozen=True)
class Variant:
    """The properties by which bodies differ, apart from their inputs.

    Attributes:
      bits: code width; 0 for floats.
      tiles: whether the operands are tiled (``layout`` 1).
      parts: number of merged linears, 0 for a single one.
      ranks: whether each of them has a rank of its own.
      activation: one of :data:`~eoracc.plugins.op.ACTIVATIONS`, empty for none.
      rows: whether a table names its number of rows (``N``).
    """

    bits: int
    tiles: bool
    parts: int
    ranks: bool
    activation: str
    rows: bool

    @classmethod
    def of(cls, node: ir.Node) -> Variant:
        """The variant of ``node``.

        Raises:
          PluginError: an attribute of ``node`` is missing or has a value that the op does not take.
        """
        if node.op_type == DENSE_OP:
            return cls(0, tiles=False, parts=0, ranks=False, activation="", rows=False)
        where = f"node {node.name}"
        bits = node.attributes["bits"].as_int() if "bits" in node.attributes else None
        if bits not in BITS:
            raise PluginError(f"{where}: bits must be one of {BITS}, not {bits}")
        layout = node.attributes.get_int("layout", 0)
        if layout not in (0, 1):
            raise PluginError(f"{where}: layout must be 0 or 1, not {layout}")
        parts = tuple(node.attributes.get_ints("parts", ()))
        ranks = tuple(node.attributes.get_ints("ranks", ()))
        activation = node.attributes.get_string("activation", "")
        if any(size <= 0 or size % TILE for size in parts) or (
            parts and sum(parts) != node.attributes.get_int("N", 0)
        ):
            raise PluginError(f"{where}: parts {parts} are no multiples of {TILE} that add up to N")
        if ranks and (len(ranks) != len(parts) or min(ranks) < 0):
            raise PluginError(f"{where}: ranks {ranks} are not one for each of the parts {parts}")
        if activation and activation not in ACTIVATIONS:
            raise PluginError(f"{where}: activation must be one of {ACTIVATIONS}, not {activation}")
        if activation and (len(parts) != 2 or parts[0] != parts[1]):
            raise PluginError(f"{where}: {activation} takes two equal parts, not {parts}")
        fused = (
            parts
            or activation
            or any(value is not None for value in node.inputs[Input.norm_weight :])
        )
        if fused and not layout:
            raise PluginError(f"{where}: only layout 1 is fused with anything")
        rows = node.op_type == GATHER_OP and "N" in node.attributes
        return cls(bits, bool(layout), len(parts), bool(ranks), activation, rows)

    def absent(self, op_type: str) -> set[str]:
        """Attributes of ``op_type`` that nodes of the variant do not have.

        A function does not declare them: those from before an attribute stay what they were.
        """
        optional = {"ranks": self.ranks, "N": self.rows or op_type != GATHER_OP}
        return {name for name, given in optional.items() if not given}

    def overload(self, present: set[str]) -> str:
        """The name of the overload of a node with the inputs ``present``."""
        words = [f"bits{self.bits}" if self.bits else "dense"]
        if self.tiles:
            words.append("tiles")
        words += [part for name, part in _OVERLOAD_PARTS.items() if name in present]
        if self.parts > 1:
            words.append(f"parts{self.parts}")
        if self.ranks:
            words.append("ranks")
        if self.rows:
            words.append("rows")
        if self.activation:
            words.append(self.activation)
        return "_".join(words)
