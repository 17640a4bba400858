"""How much of each weight a factorisation removes, under one total: pure functions on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.solvers.allocation import Candidate, allocate
from eoracc.passes.solvers.factorization import factorized_rank

__all__ = ["MAX_RATIO", "ratios_by_energy", "ratios_by_loss"]

MAX_RATIO: Final = 0.95
"""No weight loses more of its parameters than this."""

_STEPS: Final = np.linspace(0.01, MAX_RATIO, 95)
"""Ratios that :func:`ratios_by_energy` chooses from, next to leaving a weight alone."""


def ratios_by_loss(losses: Sequence[float], sizes: Sequence[int], ratio: float) -> list[float]:
    """The ratios of weights of one type by SVD-LLM V2: what loses more gives up less.

    ``R_i = R sum_j n_j / sum_j (n_j l_j) l_i`` with ``l_i = 1 / log(L_i)``, which for ``g`` weights
    of one size is the paper's ``g R l_i / sum_j l_j``. Two things that it leaves open: a loss below
    ``e`` counts as ``e``, since the logarithm must be positive, and what would exceed 0.95 is held
    there, the rest of it shared out among the others.

    Args:
      losses: ``L_i = ||(W_i - W_i') X||_F``, the least that a weight loses at the common ratio.
      sizes: ``n_i``, parameters of each weight.
      ratio: ``R``, the share of all their parameters that is removed, in 0..0.95.

    Returns:
      ``R_i``, such that ``sum n_i R_i = R sum n_i``.

    Source: Wang et al., SVD-LLM V2, arXiv:2503.12340, algorithm 1.

    >>> [round(ratio, 3) for ratio in ratios_by_loss([np.e, np.e**3], [10, 10], 0.2)]
    [0.3, 0.1]
    """
    shares = 1 / np.log(np.maximum(losses, np.e))
    weights = np.asarray(sizes, np.float64)
    held = np.zeros(len(shares), bool)
    ratios = np.zeros(len(shares))
    while not held.all():
        left = ratio * weights.sum() - MAX_RATIO * weights[held].sum()
        ratios = np.where(held, MAX_RATIO, left * shares / (weights * shares)[~held].sum())
        beyond = (ratios > MAX_RATIO) & ~held
        if not beyond.any():
            break
        held |= beyond
    return [float(share) for share in np.minimum(ratios, MAX_RATIO)]


def ratios_by_energy(
    spectra: Sequence[NDArray[np.floating]], shapes: Sequence[tuple[int, int]], ratio: float
) -> list[float]:
    """The ratios that leave the least sum of relative output errors, squared, under one total.

    ``min sum_i sum_{j > r_i} sigma_ij^2 / sum_j sigma_ij^2`` subject to
    ``sum_i r_i (m_i + n_i) <= (1 - R) sum_i m_i n_i``, where a weight may also be left alone
    (:func:`~eoracc.passes.solvers.allocation.allocate`).

    Args:
      spectra: squared singular values of each ``W_i S_i``, largest first.
      shapes: ``m_i, n_i``.
      ratio: ``R``, in 0..0.95.

    Returns:
      ``R_i``, 0 for a weight that is left alone.
    """
    items = []
    for energies, (rows, columns) in zip(spectra, shapes, strict=True):
        caught = np.concatenate([[0.0], np.cumsum(energies, dtype=np.float64)])
        whole = caught[-1] if caught[-1] > 0 else 1.0
        ranks = [factorized_rank(rows, columns, step) for step in _STEPS]
        items.append(
            [
                Candidate(rows * columns, 0.0),
                *(
                    Candidate(rank * (rows + columns), float(1 - caught[rank] / whole))
                    for rank in ranks
                ),
            ]
        )
    budget = sum(rows * columns for rows, columns in shapes)
    # What ranks rounded down leave of the budget at the common ratio is no reason to refuse it.
    chosen = allocate(items, max(int((1 - ratio) * budget), _least(items))).chosen
    return [0.0 if at == 0 else float(_STEPS[at - 1]) for at in chosen]


def _least(items: Sequence[Sequence[Candidate]]) -> int:
    return sum(min(candidate.nbytes for candidate in item) for item in items)
