"""The comparison of factorisations: its variants, its rows, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import factorization
from benchmarks.factorization import METHODS, Bench, Row, Variant
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.text.windows import Windows
from tests.tiny_models import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    loaded = load(str(tiny_model("smollm", folder / "model")), work=folder / "work")
    rng = np.random.default_rng(0)

    def windows(count: int) -> Windows:
        ids = rng.integers(0, VOCABULARY, (count, 24))
        return Windows(ids, np.ones_like(ids))

    return Bench(loaded, windows(6), windows(2), windows(2), SilentProgress())


@pytest.mark.parametrize("text", METHODS)
def test_every_variant_is_a_valid_pipeline(text: str) -> None:
    passes = Variant.parse(text).passes(0.3, blocks=30)
    content = {"model": "m", "calibration": {"text": "t"}, "passes": passes, "output": "o"}
    config = BuildConfig.model_validate(content)
    assert config.passes[-1].ratio == 0.3


def test_flags_and_options_are_read() -> None:
    text = "allocated+unit+outputs+erc_svd{beta: adaptive}"
    passes = Variant.parse(text).passes(0.2, blocks=30)
    assert passes == [
        {"allocate_ratios": {"by": "loss"}},
        {"calibrate": {"match": "outputs", "tokens": "unit"}},
        {"erc_svd": {"ratio": 0.2, "beta": "adaptive"}},
    ]
    with pytest.raises(ValueError, match="is no variant"):
        Variant.parse("last_k erc_svd")


def test_last_blocks_take_what_all_were_to_lose() -> None:
    chosen = Variant.parse("last_k+svd_llm").passes(0.2, blocks=30)
    # All blocks are a candidate.
    assert chosen[0] == {"select_last_k": {"ratio": 0.2, "step": 5}}
    (options,) = Variant.parse("last20+svd_llm").passes(0.2, blocks=30)[-1].values()
    assert options["ratio"] == pytest.approx(0.3)
    assert options["overrides"] == {f"*.layers.{block}.*": {"skip": True} for block in range(10)}


def test_blocks_that_are_left_alone_count_as_removed_from_the_others(bench: Bench) -> None:
    everywhere, last = (bench.measure(text, 0.4) for text in ("svd_llm", "last1+svd_llm"))
    # Two blocks of one size; ranks are whole numbers, rounded down.
    assert 0.4 <= everywhere.removed < 0.55
    assert 0.4 <= last.removed < 0.55
    assert last.wiki != everywhere.wiki


def test_a_row_is_what_was_removed_and_what_that_did(bench: Bench) -> None:
    original = bench.original()
    assert (original.ratio, original.removed) == (0, 0)
    row = bench.measure("svd_llm", 0.6)
    assert 0.6 <= row.removed < 0.75
    # The model is random: that it became another one is all that can be told.
    assert row.wiki != pytest.approx(original.wiki, rel=1e-3)
    assert np.isfinite([row.wiki, row.c4]).all()
    # The next variant starts from the original again.
    assert bench.original() == original


def test_what_has_been_measured_is_not_measured_again(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[str, float]] = []

    def measured(_: Bench, variant: str, ratio: float) -> Row:
        asked.append((variant, ratio))
        return Row(variant=variant, ratio=ratio, removed=ratio, wiki=30, c4=40, cpu_s=1)

    monkeypatch.setattr(Bench, "measure", measured)
    monkeypatch.setattr(factorization, "_bench", lambda *_: bench)
    kept = tmp_path / "rows.json"
    command = ["factorization", "--only", "svd_llm", "nsvd", "--json", str(kept), "--ratios", "0.2"]
    monkeypatch.setattr("sys.argv", command)
    factorization.main()
    assert asked == [("svd_llm", 0.2), ("nsvd", 0.2)]
    assert [row["variant"] for row in json.loads(kept.read_text())["rows"]] == [
        "original",
        "svd_llm",
        "nsvd",
    ]
    monkeypatch.setattr("sys.argv", [*command, "0.3"])
    factorization.main()
    assert asked[2:] == [("svd_llm", 0.3), ("nsvd", 0.3)]
    assert "wiki 30%" in capsys.readouterr().out
