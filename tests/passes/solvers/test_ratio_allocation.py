"""Ratios under one total: the published rule, and the least sum of errors."""

from __future__ import annotations

import numpy as np
import pytest

from eoracc.passes.solvers.factorization import factorized_rank
from eoracc.passes.solvers.ratio_allocation import MAX_RATIO, ratios_by_energy, ratios_by_loss


def test_weights_of_one_size_get_the_published_ratios() -> None:
    losses = np.array([40.0, 300.0, 7.0, 2500.0])
    inverse = 1 / np.log(losses)
    found = ratios_by_loss([*losses], [100] * 4, 0.3)
    np.testing.assert_allclose(found, 4 * 0.3 * inverse / inverse.sum(), rtol=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.7, 0.9, MAX_RATIO])
def test_what_is_removed_is_what_was_asked_for(ratio: float) -> None:
    rng = np.random.default_rng(0)
    losses = np.exp(rng.uniform(0, 9, 12))
    sizes = rng.integers(50, 500, 12)
    found = np.array(ratios_by_loss([*losses], [*sizes], ratio))
    assert (found <= MAX_RATIO).all()
    assert (found * sizes).sum() == pytest.approx(ratio * sizes.sum(), rel=1e-12)
    # What loses more gives up no more.
    assert (np.diff(found[np.argsort(losses)]) <= 1e-12).all()


def test_losses_below_e_count_as_e() -> None:
    assert ratios_by_loss([0.0, 1.0, np.e], [1, 1, 1], 0.3) == pytest.approx([0.3, 0.3, 0.3])


def test_energy_leaves_less_than_one_ratio_for_all_and_keeps_to_the_total() -> None:
    rng = np.random.default_rng(1)
    shapes = [(60, 90), (90, 60), (40, 120)]
    spectra = [
        np.sort(rng.random(min(shape)) ** power)[::-1]
        for shape, power in zip(shapes, (1, 6, 3), strict=True)
    ]

    def left(ratios: list[float]) -> float:
        total = 0.0
        for energies, shape, ratio in zip(spectra, shapes, ratios, strict=True):
            if ratio > 0:
                total += energies[factorized_rank(*shape, ratio) :].sum() / energies.sum()
        return total

    def kept(ratios: list[float]) -> int:
        return sum(
            shape[0] * shape[1] if ratio == 0 else factorized_rank(*shape, ratio) * sum(shape)
            for shape, ratio in zip(shapes, ratios, strict=True)
        )

    found = ratios_by_energy(spectra, shapes, 0.4)
    budget = 0.6 * sum(rows * columns for rows, columns in shapes)
    assert kept(found) <= budget
    assert left(found) < 0.95 * left([0.4] * 3)
    # Factors of a weight that is hardly truncated cost more than it: some are left alone instead.
    many = ratios_by_energy([np.ones(50)] * 40, [(50, 50)] * 40, 0.4)
    assert 0.0 in many
    ranks = [0 if one == 0 else factorized_rank(50, 50, one) for one in many]
    assert sum(100 * rank or 50 * 50 for rank in ranks) <= 0.6 * 40 * 50 * 50


def test_energy_is_that_of_each_weight_s_own_output() -> None:
    """How large outputs are says nothing: what counts is the share of them that goes."""
    spectra = [np.geomspace(1, 1e-4, 50), np.geomspace(1, 1e-2, 50)]
    found = ratios_by_energy(spectra, [(50, 50)] * 2, 0.4)
    # By powers of two, which scale without rounding.
    assert ratios_by_energy([1024 * spectra[0], spectra[1]], [(50, 50)] * 2, 0.4) == found
    assert found[0] > found[1] + 0.1


def test_a_weight_that_loses_nothing_is_truncated_first() -> None:
    flat, steep = np.ones(50), np.eye(1, 50)[0]
    found = ratios_by_energy([flat, steep], [(50, 50), (50, 50)], 0.4)
    assert found[0] < 0.05
    assert found[1] > 0.7


def test_spectra_of_zeros_are_no_special_case() -> None:
    found = ratios_by_energy([np.zeros(20), np.ones(20)], [(20, 20), (20, 20)], 0.3)
    assert all(0 <= ratio <= MAX_RATIO for ratio in found)
