"""Compare a loaded graph with the eager model of the original checkpoint, before any other work.

Of a large model, the first blocks stand for all (:mod:`eoracc.compiler.frontend_check.blocks`).

The graph is mobius's reading of config.json. A field that it does not know leaves a graph that is
well formed and computes something else. So every command that loads a checkpoint compares the two
first, at the input of each linear and at the logits, and no option turns it off.

Tolerances are derived as those of parity are (:mod:`eoracc.compiler.targets.parity_record`): a sum
of ``K`` products is off by ``sqrt(K) u`` relative to its size, ``u = 2^-24``, the linears passed so
far add up, and the angle of position ``p`` is off by ``2 p u``. The result is multiplied by
:data:`MARGIN`. Errors are norms of a token's row, relative to the root mean square of the rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.config import read_config
from eoracc.compiler.frontend.files import first_line
from eoracc.compiler.frontend.quiet import quiet
from eoracc.compiler.frontend_check.blocks import compared_blocks, first_blocks, shorten
from eoracc.compiler.frontend_check.calls import Call, calls_for
from eoracc.compiler.frontend_check.eager import EagerValues, run_eager
from eoracc.compiler.frontend_check.explain import Difference, explain, part_of
from eoracc.compiler.frontend_check.graph import GraphRun, past_shapes
from eoracc.compiler.sweep.batch import Float
from eoracc.errors import EoraccError, ModelError
from eoracc.passes.graph.linears import Linear, find_linears

if TYPE_CHECKING:
    import onnx_ir as ir

    from eoracc.compiler.frontend.load import LoadedModel
    from eoracc.passes.progress import Progress

__all__ = ["MARGIN", "check_frontend"]

MARGIN = 16.0
"""What a derived tolerance is multiplied by: activations that cancel lose more than sums do."""

_UNIT_ROUNDOFF = 2.0**-24


def check_frontend(loaded: LoadedModel, progress: Progress) -> None:
    """Check that the graph of a checkpoint computes what transformers computes from its folder.

    Args:
      loaded: the checkpoint; its graph is only read.
      progress: shown the phase ``check``.

    Raises:
      ModelError: it does not; names the first node whose output differs.
    """
    config, model, blocks = loaded.config, *_first_blocks(loaded)
    calls = calls_for(
        config,
        block_parameters=_block_parameters(model),
        cached_elements=sum(heads * size for heads, size in past_shapes(model).values()),
    )
    with progress.phase("check", 2) as phase:
        expected = _eager_values(loaded, model, calls, blocks)
        phase.advance("eager model")
        run = GraphRun(model, calls, config.vocab_size)
        difference = next(_differences(run, calls, expected, config.hidden_size), None)
        phase.advance("graph")
    if difference is not None:
        raise ModelError(f"{loaded.folder}: {explain(difference, config)}")


def _first_blocks(loaded: LoadedModel) -> tuple[ir.Model, int]:
    """The graph of the blocks that are compared, and their number."""
    blocks = compared_blocks(loaded.config, _block_parameters(loaded.model))
    if blocks < loaded.config.num_hidden_layers:
        shortened = first_blocks(loaded.model, blocks)
        if shortened is not None:
            return shortened, blocks
    return loaded.model, int(loaded.config.num_hidden_layers)


def _block_parameters(model: ir.Model) -> int:
    return sum(
        linear.in_features * linear.out_features
        for linear in find_linears(model)
        if linear.block is not None
    )


def _eager_values(
    loaded: LoadedModel, model: ir.Model, calls: Sequence[Call], blocks: int
) -> list[list[EagerValues]]:
    """By call and row. The eager model is gone afterwards."""
    linears, shapes = [linear.name for linear in find_linears(model)], past_shapes(model)
    config = read_config(loaded.folder, trust_remote_code=loaded.trust_remote_code)
    shorten(config, blocks)
    try:
        eager = load_eager(
            loaded.folder, {}, trust_remote_code=loaded.trust_remote_code, config=config
        )
        with quiet():
            return [run_eager(eager, call, linears, shapes) for call in calls]
    except EoraccError:
        raise
    except Exception as error:
        raise ModelError(
            f"{loaded.folder}: transformers cannot run this model ({first_line(error)})"
        ) from error


def _differences(
    run: GraphRun, calls: Sequence[Call], expected: Sequence[Sequence[EagerValues]], hidden: int
) -> Iterator[Difference]:
    """Where the graph's values differ from the eager model's, in the order of computation."""
    nodes = {linear.node for linear in run.executor.linears}
    positions = max(call.last_position for call in calls)
    depth, angle = float(hidden) ** 0.5, 0.0
    for groups in run.levels():
        for group in groups:
            linear = group.linears[0]
            errors = [
                _largest_error(rows, [row.inputs[linear.name] for row in of_call])
                for rows, of_call in zip(run.inputs(group), expected, strict=True)
            ]
            tolerance = _tolerance(depth, angle)
            yield from _exceeding(errors, tolerance, calls, linear.input, linear, nodes)
        depth += max(
            float(linear.in_features) ** 0.5 for group in groups for linear in group.linears
        )
        angle = 2.0 * positions
    errors = [
        _largest_error(rows, [row.logits for row in of_call])
        for rows, of_call in zip(run.logits(), expected, strict=True)
    ]
    yield from _exceeding(errors, _tolerance(depth, angle), calls, run.output, None, nodes)


def _tolerance(depth: float, angle: float) -> float:
    return MARGIN * _UNIT_ROUNDOFF * (depth + angle)


def _largest_error(rows: Sequence[Float], expected: Sequence[Float]) -> float:
    """Largest norm of a token's error over all rows of a call, relative to what tokens measure.

    Tokens for which the eager model itself overflows are left out: a pass refuses them, by name.
    """
    actual, exact = (np.concatenate(values).astype(np.float64) for values in (rows, expected))
    finite = np.isfinite(exact).all(axis=-1)
    if not finite.any():
        return 0.0
    exact = exact[finite]
    error = float(np.linalg.norm(actual[finite] - exact, axis=-1).max())
    size = float(np.sqrt(np.mean(np.square(np.linalg.norm(exact, axis=-1)))))
    return error / size if size else error


def _exceeding(
    errors: Sequence[float],
    tolerance: float,
    calls: Sequence[Call],
    value: ir.Value,
    linear: Linear | None,
    linears: Collection[ir.Node],
) -> Iterator[Difference]:
    # Not `error > tolerance`: NaN differs too.
    wrong = [place for place, error in enumerate(errors) if not error <= tolerance]
    if wrong:
        yield Difference(
            value=value,
            linear=linear,
            part=part_of(value, linear, linears),
            calls=[calls[place] for place in wrong],
            everywhere=len(wrong) == len(calls),
            error=max(errors[place] for place in wrong),
            tolerance=tolerance,
        )
