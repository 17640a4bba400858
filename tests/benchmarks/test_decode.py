from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import decode, engines
from benchmarks.decode import DECODE, Engine, MissingError, Series, running

OURS = Engine("eoracc out", "genai", Path("ours"), ours=True)
FAST = Engine("fast", "genai", Path("fast"))
SLOW = Engine("slow", "llama_cpp", Path("slow"))
BEFORE = Engine("eoracc out, before", "genai", Path("before"), before=True)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each engine's weights."""
    known = {"ours": 80, "fast": 100, "slow": 60}
    monkeypatch.setattr(Engine, "nbytes", property(lambda engine: known[str(engine.path)]))
    return known


def series(ours: float, fast: float, slow: float) -> Series:
    return Series({OURS: [ours] * 3, SLOW: [slow] * 3, FAST: [fast] * 3}, bandwidth=1e3)


def test_bar_is_set_by_the_fastest_peer(sizes: dict[str, int]) -> None:
    assert sizes
    first, second = decode.rows("model", DECODE, series(1.0, 2.0, 4.0), {})
    assert (first.peer, first.ratio, first.holds) == ("fast", 0.5, True)
    assert (second.peer, second.ratio, second.bar, second.holds) == ("slow", 0.25, None, None)
    assert first.ours_bandwidth == 80 / 1.0 / 1e3


def test_more_bytes_than_the_fastest_peer_break_the_bar(sizes: dict[str, int]) -> None:
    sizes["ours"] = 101
    assert decode.rows("model", DECODE, series(1.0, 2.0, 4.0), {})[0].holds is False


def test_missing_peer_leaves_the_bar_open(sizes: dict[str, int]) -> None:
    assert sizes
    first = decode.rows("model", DECODE, series(1.0, 2.0, 4.0), {"third": "not there"})[0]
    assert first.holds is None
    assert first.note == "the fastest peer that ran"


def test_an_earlier_artifact_has_bars_of_its_own(sizes: dict[str, int]) -> None:
    sizes["before"] = 90
    timed = {OURS: [1.0, 1.2], FAST: [2.0, 2.0], BEFORE: [2.0, 2.1]}
    measured = Series(timed, bandwidth=1e3, peak_bytes={OURS: 50, FAST: 1, BEFORE: 100})
    peer, speed, memory = decode.rows("model", DECODE, measured, {})
    assert (peer.peer, peer.note) == ("fast", "the fastest peer")
    assert (speed.peer, speed.bar, speed.holds) == ("eoracc out, before", 1 / 1.9, False)
    assert speed.ratio == pytest.approx(np.median([1 / 2, 1.2 / 2.1]))
    assert (memory.case, memory.ratio, memory.holds) == (
        "model peak memory, eoracc out",
        0.5,
        True,
    )
    # Without a peer nothing else is compared; prefill has no bar, and no memory of its own.
    alone = Series({OURS: [1.0], BEFORE: [2.0]}, bandwidth=1e3, peak_bytes={OURS: 50, BEFORE: 100})
    (prefill,) = decode.rows("model", decode.PREFILL, alone, {})
    assert (prefill.ratio, prefill.bar, prefill.holds) == (0.5, None, None)


def test_tables_that_are_looked_up_are_no_bytes_of_a_step(tmp_path: Path) -> None:
    def tensor(name: str, rows: int) -> TensorProto:
        return numpy_helper.from_array(np.zeros((rows, 4), np.float32), name)

    nodes = [
        helper.make_node("Gather", ["untied", "ids"], ["a"]),
        helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("Transpose", ["tied"], ["head"]),
        helper.make_node("MatMul", ["a", "head"], ["c"]),
        helper.make_node("MatMulNBits", ["b", "weight"], ["d"], domain="com.microsoft"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    out = helper.make_tensor_value_info("d", TensorProto.FLOAT, None)
    graph = helper.make_graph(
        nodes, "g", [ids], [out], [tensor("untied", 100), tensor("tied", 10), tensor("weight", 1)]
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert decode.onnx_bytes(tmp_path / "model.onnx") == (10 + 1) * 4 * 4


@pytest.mark.parametrize(("names", "counted"), [(["output.weight"], 1), ([], 2)])
def test_gguf_embedding_counts_where_it_is_the_head(
    names: list[str], counted: int, tmp_path: Path
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name in ["token_embd.weight", "blk.0.ffn_up.weight", *names]:
        writer.add_tensor(name, np.zeros((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert decode.gguf_bytes(tmp_path / "m.gguf") == (counted + len(names)) * 4 * 8 * 4


def test_engine_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    # An interpreter without any package stands for one without llama-cpp-python.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    engine = Engine("llama.cpp", "llama_cpp", tmp_path / "none.gguf", str(python))
    with pytest.raises(MissingError, match="No module named 'llama_cpp'"), running(engine, 1):
        pass


def test_engine_that_dies_is_named(tmp_path: Path) -> None:
    engine = Engine("llama.cpp", "llama_cpp", tmp_path / "none.gguf", "false")
    with pytest.raises(MissingError, match="false ends without an answer"), running(engine, 1):
        pass


_STAND_IN = """
import json, sys
print(json.dumps({"ready": "stand-in"}), flush=True)
for line in sys.stdin:
    size = {"decode": 1, "prefill": 300}[json.loads(line)["measure"]]
    held = bytearray(size * 2**20)
    print(json.dumps({"seconds": [3.0, 1.0, 2.0]}), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_decoding(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(_STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    python.chmod(0o755)
    with running(Engine("any", "genai", tmp_path, str(python)), 1) as worker:
        assert worker.seconds(DECODE) == 2.0
        assert worker.decoding_bytes is not None
        # An interpreter takes a few megabytes, the prompt took 300.
        assert 2**20 < worker.decoding_bytes < 100 * 2**20


def test_decoding_is_timed_after_the_prompt_and_two_steps() -> None:
    calls: list[str] = []

    class Fake:
        version = "fake"

        def start(self, prompt: list[int]) -> None:
            calls.append(f"start {len(prompt)}")

        def step(self) -> None:
            calls.append("step")

    assert len(engines.seconds(Fake(), "decode", 3)) == 3
    assert calls == [f"start {engines.PROMPT_TOKENS}", *["step"] * 5]
    calls.clear()
    assert len(engines.seconds(Fake(), "prefill", 512)) == 1
    assert calls == ["start 512"]


def test_peers_tool_that_fails_is_named(tmp_path: Path) -> None:
    missing: dict[str, str] = {}
    engine = Engine("llama.cpp Q4_0", "llama_cpp", tmp_path / "Q4_0.gguf")
    assert not decode._make(engine, "gguf", tmp_path / "none.gguf", "Q4_0", missing)
    assert list(missing) == ["llama.cpp Q4_0"]
    assert not engine.path.exists()
