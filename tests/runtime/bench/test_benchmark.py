from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from eoracc.runtime import ArtifactError, BackendError, load
from eoracc.runtime.bench import BenchOptions, run_benchmark, workloads
from tests.tiny_artifact import write_tiny_artifact

FEW = ("--prompt-tokens", "20", "--new-tokens", "3", "--repeats", "2", "--threads", "1")


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from benchmarks.adapters import add_random_adapters

    folder = write_tiny_artifact(tmp_path_factory.mktemp("slots"), adapter_type="int8")
    add_random_adapters(folder, 16, "int8")
    return folder


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def numbers(content: object) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(content, dict):
        return [number for value in content.values() for number in numbers(value)]
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [content] if isinstance(content, int | float) and not isinstance(content, bool) else []


def test_a_folder_that_changes_amid_the_measurement(
    with_adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eoracc.runtime.adapters.store import remove_adapter

    folder = shutil.copytree(with_adapters, tmp_path / "artifact")

    def change(*_: object, **__: object) -> None:
        remove_adapter(folder, "one")

    monkeypatch.setattr("eoracc.runtime.bench.benchmark.measure_start", change)
    with pytest.raises(ArtifactError, match=r"differs in adapters/one.* after it was loaded"):
        run_benchmark(folder, BenchOptions(threads=1, prompt_tokens=20, new_tokens=3))


def test_json_has_every_figure(with_adapters: Path) -> None:
    result = bench(with_adapters, *FEW, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["digest"] == load(with_adapters).manifest.digest
    asked = {"threads": 1, "prompt_tokens": 20, "new_tokens": 3, "repeats": 2}
    assert {name: report[name] for name in asked} == asked
    assert [figures["adapter"] for figures in report["adapters"]] == ["none", "one", "two"]
    assert [figures["decode_time_ratio"] is None for figures in report["adapters"]] == [
        True,
        False,
        False,
    ]
    assert [figures["rows"] for figures in report["batches"]] == [1, 4, 8]
    assert report["batches"][1]["adapters"] == ["one", "two", "one", "two"]
    assert report["switch"]["outputs_differ"] is True
    assert report["switch"]["adapter_switch_ms"]["repeats"] == 6
    start = report["start"]
    size = sum(path.stat().st_size for path in with_adapters.iterdir() if path.is_file())
    assert start["peak_memory_bytes"] >= start["loaded_memory_bytes"] > size
    for figures in report["adapters"]:
        speed, time = figures["prefill_tokens_per_s"]["median"], figures["first_token_ms"]["median"]
        # Units, not speed: on a busy machine the two medians may be far apart.
        assert 1 / 30 < speed * time / (20 * 1e3) < 30
    del report["switch"]["adapter_switch_ms"]  # the only difference: noise may turn it round
    assert min(numbers(report)) > 0


def test_only_the_adapters_asked_for_are_compared(with_adapters: Path) -> None:
    options = BenchOptions(
        adapters=("two", "two"), threads=1, prompt_tokens=4, new_tokens=2, repeats=1
    )
    report = run_benchmark(with_adapters, options)
    assert [figures.adapter for figures in report.adapters] == ["none", "two"]
    assert report.batches[-1].adapters == ["two"] * 8


def test_an_artifact_without_adapters_has_nothing_to_switch(tiny_artifact: Path) -> None:
    report = run_benchmark(
        tiny_artifact, BenchOptions(threads=1, prompt_tokens=4, new_tokens=2, repeats=1)
    )
    assert [figures.adapter for figures in report.adapters] == ["none"]
    assert report.batches[-1].adapters == ["none"] * 8
    assert report.switch is None


def test_outputs_that_do_not_differ_are_told(
    with_adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = workloads.first_logprob
    monkeypatch.setattr(
        workloads, "first_logprob", lambda model, prompt, _: real(model, prompt, None)
    )
    options = BenchOptions(threads=1, prompt_tokens=4, new_tokens=2, repeats=1)
    switch = run_benchmark(with_adapters, options).switch
    assert switch is not None
    assert switch.outputs_differ is False


def test_the_table_shows_adapters_and_units(with_adapters: Path) -> None:
    result = bench(with_adapters, *FEW)
    assert result.exit_code == 0, result.output
    for text in ("none", "one", "two", "tokens/s", "first token", "load in", "adapter switch:"):
        assert text in result.stdout
    assert "outputs differ by adapter" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", "three"), "adapter 'three': the artifact has no such adapter"),
        (("--prompt-tokens", "200"), "lower --prompt-tokens or --new-tokens"),
        (
            ("--new-tokens", "100", "--prompt-tokens", "4"),
            "the benchmark needs 133 tokens, the context has 128",
        ),
    ],
)
def test_a_bad_option_is_one_sentence(
    with_adapters: Path, arguments: Sequence[str], message: str
) -> None:
    result = bench(with_adapters, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_what_fails_in_the_child_is_told(tiny_artifact: Path) -> None:
    from eoracc.runtime.bench.start import measure_start

    with pytest.raises(BackendError, match="cannot be started on its own: the prompt has 200"):
        measure_start(
            tiny_artifact, threads=1, prompt_tokens=200, new_tokens=1, backend="onnxruntime"
        )


def test_bench_needs_neither_torch_nor_transformers(tiny_artifact: Path) -> None:
    program = (
        "import sys\nfrom eoracc.compiler.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "bench", tiny_artifact, *FEW, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""
