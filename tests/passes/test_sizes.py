from __future__ import annotations

import pytest

from eoracc.passes.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("90MB", 90_000_000),
        ("88.2MB", 88_200_000),
        ("1.2 GB", 1_200_000_000),
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("700kB", 700_000),
        (93_500_000, 93_500_000),
        ("93500000", 93_500_000),
    ],
)
def test_a_size_is_a_number_with_a_unit(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["90 mb", "MB", "-1MB", "0", "0.1B", "1e6", "90M", True, None, ""])
def test_anything_else_is_refused_in_one_sentence(text: object) -> None:
    with pytest.raises(ValueError, match="is no size: give a number with a unit, 90MB"):
        parse_size(text)
