"""The entries of linears, and of factorised weights, in report.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.report.content import FactorizedReport, LinearReport, WarningReport
from eoracc.plugins.operands.weight import zero_point_bits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from eoracc.passes.graph.linears import Linear

__all__ = ["factorized_reports", "linear_report", "linear_warnings", "padding_warnings"]


def linear_report(linear: Linear, *, stored_bytes: int | None = None) -> LinearReport:
    """Describe ``linear`` as it stands in the graph.

    Args:
      linear: compressed or not.
      stored_bytes: of an uncompressed weight; None takes float32.
    """
    weight, codes, factors = linear.compressed, linear.quantized, linear.factors
    if weight is None:
        plain = 4 * linear.in_features * linear.out_features
        size = plain if stored_bytes is None else stored_bytes
    else:
        size = weight.nbytes
    return LinearReport(
        name=linear.name,
        block=linear.block,
        role=linear.role,
        shape=(linear.out_features, linear.in_features),
        bits=None if codes is None else codes.bits,
        group_size=None if codes is None else codes.group_size,
        sparsity=linear.record.sparsity,
        rank=0 if factors is None else factors.rank,
        bytes=size + (0 if factors is None else factors.nbytes),
        errors=dict(linear.record.errors),
        notes=list(linear.record.notes),
        factor_of=None if linear.whole is None else linear.whole.name,
    )


def factorized_reports(linears: Iterable[Linear]) -> list[FactorizedReport]:
    """Describe the weights that ``linears`` hold factors of, once each, in their order."""
    wholes = dict.fromkeys(linear.whole for linear in linears if linear.whole is not None)
    return [_factorized_report(whole) for whole in wholes]


def linear_warnings(linears: Sequence[Linear]) -> list[WarningReport]:
    """The warnings of ``linears`` and of the weights that they hold factors of, in their order."""
    wholes = dict.fromkeys(linear.whole for linear in linears if linear.whole is not None)
    return [
        WarningReport(
            code=warning.code,
            linear=linear.name,
            message=warning.message,
            figures=dict(warning.figures),
        )
        for linear in (*wholes, *linears)
        for warning in linear.record.warnings
    ]


def padding_warnings(linears: Iterable[Linear]) -> list[WarningReport]:
    """At most one warning: the bytes that pad rows of ``linears`` to whole groups.

    Tiles hold whole scales and zero points, but no codes, of the columns that pad a row.
    """
    padded: list[tuple[str, float]] = []
    for linear in linears:
        weight = linear.quantized
        if weight is None:
            continue
        rows, groups = weight.scales.shape
        missing = groups * weight.group_size - weight.in_features
        # A whole row is rounded up to a multiple of 8.
        if missing and groups > 1:
            grid: float = weight.scales.itemsize
            if weight.zero_points is not None:
                grid += zero_point_bits(weight.bits) / 8
            padded.append((linear.name, rows * grid * missing / weight.group_size))
    if not padded:
        return []
    total = sum(nbytes for _, nbytes in padded)
    return [
        WarningReport(
            code="padded_groups",
            linear=None,
            message=f"group sizes do not divide the rows of {len(padded)} linears "
            f"({padded[0][0]} first): {total:,.0f} bytes of scales and zero points pad them; "
            "'group_size: auto' takes sizes that divide, where there are any",
            figures={"linears": len(padded), "bytes": total},
        )
    ]


def _factorized_report(whole: Linear) -> FactorizedReport:
    assert whole.factorized is not None  # noqa: S101 - it has factors
    rows, columns, rank = whole.out_features, whole.in_features, whole.factorized.rank
    return FactorizedReport(
        name=whole.name,
        block=whole.block,
        role=whole.role,
        shape=(rows, columns),
        rank=rank,
        removed=1 - rank * (rows + columns) / (rows * columns),
        errors=dict(whole.record.errors),
        notes=list(whole.record.notes),
    )
