"""Engines of one product, built in the real builder: they take no GPU, and a second each."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
from typing_extensions import override

from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.targets.tensorrt.engines.build import (
    BuiltEngine,
    build_engines,
    require_package,
)
from eoracc.compiler.targets.tensorrt.engines.task import EngineTask
from eoracc.errors import TargetError
from tests.damage import DAMAGES
from tests.optional import require

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from eoracc.compiler.targets.tensorrt.engines.task import ShapeRange

require("tensorrt_rtx")

K = 2048
PROFILE = {"x": ((1, K), (1, K), (64, K))}


def write_graph(folder: Path, *, op: str = "MatMul", bits: int = 4) -> Path:
    """``y = x W``, ``W [K, K]`` stored in ``bits`` with a scale for each 64 rows."""
    rng = np.random.default_rng(0)
    dtype = {4: ir.DataType.INT4, 8: ir.DataType.INT8}[bits]
    codes = rng.integers(-8, 8, (K, K)).astype(dtype.numpy())
    scales = rng.uniform(0.5, 1, (K // 64, K)).astype(np.float16)
    weights = [
        ir.Value(
            name=name,
            const_value=ir.Tensor(array, dtype=kind, name=name),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(kind),
        )
        for name, array, kind in (
            ("codes", codes, dtype),
            ("scales", scales, ir.DataType.FLOAT16),
        )
    ]
    half = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", type=half, shape=ir.Shape(["batch", K]))
    tape = ir.tape.Tape()
    weight = tape.op("DequantizeLinear", weights, {"axis": 0, "block_size": 64})
    y = tape.op(op, [x, weight], name="product")
    y.name, y.type, y.shape = "y", half, ir.Shape(["batch", K])
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=weights, opset_imports={"": 24}, name="g"
    )
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    ir.save(ir.Model(graph, ir_version=11), path, external_data="model.onnx.data")
    return path


def build(
    graph: Path,
    work: Path,
    *,
    profiles: Sequence[Mapping[str, ShapeRange]] = (PROFILE,),
    capabilities: Sequence[str] = ("8.9",),
    progress: SilentProgress | None = None,
) -> list[BuiltEngine]:
    return build_engines(
        graph,
        package="tensorrt_rtx",
        compute_capabilities=capabilities,
        profiles=profiles,
        work=work,
        progress=progress or SilentProgress(),
    )


@pytest.mark.parametrize(
    ("bits", "capabilities"), [(4, ["8.0", "8.6", "8.9", "12.0"]), (8, ["8.6"])]
)
def test_weights_keep_their_bits(tmp_path: Path, bits: int, capabilities: list[str]) -> None:
    graph = write_graph(tmp_path / "graph", bits=bits)
    needed = K * K * bits // 8 + K // 64 * K * 2
    progress = SilentProgress()
    built = build(graph, tmp_path, capabilities=capabilities, progress=progress)
    assert [one.compute_capability for one in built] == capabilities
    for one in built:
        # Some constants of the builder's own come on top; 16 bits would be twice or more.
        assert needed <= one.summary["weight_bytes"] < 1.01 * needed
        assert one.summary["constant_bytes"][f"Int{bits}"] == K * K * bits // 8
        # The file holds the source of its kernels, too, some 150 kB of each.
        assert needed < one.path.stat().st_size < 1.1 * needed
        assert one.summary["size"] == one.path.stat().st_size
        assert one.summary["activation_bytes"] > 0
        assert sum(one.summary["layers"].values()) > 0
        assert "Total Weights Memory" in one.log.read_text()
    assert [time.name for time in progress.times] == [f"engine {one}" for one in capabilities]


def test_finished_engines_are_found_again(tmp_path: Path) -> None:
    graph, work = write_graph(tmp_path / "graph"), tmp_path / "work"
    (first,) = build(graph, work)
    (again,) = build(graph, work, progress=(progress := SilentProgress()))
    assert progress.times == []
    assert again == first
    # What an engine depends on makes another one: the GPU, the calls, the weights.
    assert build(graph, work, capabilities=["8.6"])[0].path != first.path
    wider = {"x": ((1, K), (1, K), (65, K))}
    assert build(graph, work, profiles=[wider])[0].path != first.path
    data = graph.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[::-1])
    assert build(graph, work)[0].path != first.path


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(".json", "deleted"), (".json", "emptied"), (".engine", "bit in the middle")],
)
def test_a_damaged_engine_is_built_anew(
    tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    graph, work = write_graph(tmp_path / "graph"), tmp_path / "work"
    (first,) = build(graph, work)
    content = first.path.read_bytes()
    DAMAGES[damage](first.path.with_suffix(suffix))
    (again,) = build(graph, work)
    assert again.path.read_bytes() == content
    assert len(caplog.records) == (0 if damage == "deleted" else 1)


def test_what_the_parser_refuses_is_said_with_the_node(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", op="NoSuchOperator")
    with pytest.raises(TargetError) as caught:
        build(graph, tmp_path / "work")
    text = str(caught.value)
    assert text.startswith("tensorrt_rtx, compute capability 8.9: node product (NoSuchOperator): ")
    assert "\n" not in text
    assert not list(tmp_path.glob("work/*.engine"))


def test_what_the_builder_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    with pytest.raises(TargetError, match=r"compute capability 8\.9: .*: the builder's log is"):
        build(graph, tmp_path / "work", profiles=[{"x": ((1, K), (1, K), (64, K + 1))}])
    assert not list(tmp_path.glob("work/*.engine"))


@pytest.mark.parametrize("seconds", [0, 0.5], ids=["at once", "before it is told"])
def test_a_builder_that_dies_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    graph = write_graph(tmp_path / "graph")
    monkeypatch.setattr(
        "eoracc.compiler.targets.tensorrt.engines.build.sys.executable", "/bin/false"
    )
    as_json = EngineTask.to_json

    def late(task: EngineTask) -> str:
        time.sleep(seconds)
        return as_json(task)

    monkeypatch.setattr(EngineTask, "to_json", late)
    with pytest.raises(TargetError, match="the builder ended with status 1"):
        build(graph, tmp_path / "work")


class _Interrupting(SilentProgress):
    """Ctrl-C at the first step of a build."""

    @override
    def _show(self, name: str, total: int) -> Any:
        del name, total
        raise KeyboardInterrupt


def test_ctrl_c_leaves_neither_engine_nor_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, work = write_graph(tmp_path / "graph"), tmp_path / "work"
    started = []
    popen = subprocess.Popen

    def remember(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - as Popen
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr("eoracc.compiler.targets.tensorrt.engines.build.subprocess.Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        build(graph, work, progress=_Interrupting())
    (process,) = started
    assert process.poll() is not None
    assert not list(work.glob("*.engine"))
    assert not list(work.glob("*.partial"))
    assert build(graph, work)[0].path.exists()


def test_the_builder_stops_when_it_is_cancelled(tmp_path: Path) -> None:
    from eoracc.compiler.targets.tensorrt.engines.task import EngineTask
    from eoracc.compiler.targets.tensorrt.engines.worker import build_engine

    graph = write_graph(tmp_path / "graph")
    task = EngineTask(
        "tensorrt_rtx", graph, tmp_path / "a.engine", tmp_path / "a.log", "8.9", (PROFILE,)
    )
    events: list[dict[str, Any]] = []
    assert not build_engine(task, events.append, lambda: len(events) > 3)
    assert {event["event"] for event in events} == {"phase", "step"}
    assert not task.engine.exists()


def test_a_missing_package_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "eoracc.compiler.targets.tensorrt.engines.build.util.find_spec", lambda _: None
    )
    with pytest.raises(TargetError) as caught:
        require_package("tensorrt_rtx")
    assert str(caught.value) == (
        "tensorrt_rtx is not installed: pip install 'eoracc[tensorrt-rtx]'"
    )
    assert caught.value.exit_code == 2
