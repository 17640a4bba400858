"""Rows of the benchmark: bytes of the folder, and what a recipe allows."""

from __future__ import annotations

from dataclasses import fields

import pytest

from benchmarks.quality import Row, over_limit


def test_rows_have_the_fields_that_readers_of_the_json_use() -> None:
    assert [field.name for field in fields(Row)][:6] == [
        "recipe",
        "system",
        "bits_per_weight",
        "folder_bytes",
        "wiki",
        "c4",
    ]


@pytest.mark.parametrize(
    ("recipe", "taken", "sentence"),
    [
        ("folder-93", 93_500_000, ""),
        (
            "folder-93",
            93_500_001,
            "folder-93: the folder takes 93,500,001 bytes, more than 93,500,000",
        ),
        ("mixed-3.6", 10**9, ""),
        ("3g64", 10**9, ""),
        (None, None, ""),
    ],
)
def test_a_folder_above_the_limit_of_its_recipe_is_named(
    recipe: str | None, taken: int | None, sentence: str
) -> None:
    row = Row(recipe=recipe, system="", bits_per_weight=4.0, folder_bytes=taken, wiki=25.0)
    assert over_limit(row) == sentence
