"""The plugin through NVIDIA's front end, kernels through Triton's assembler; neither runs."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from eoracc.errors import PluginError
from eoracc.plugins.tensorrt.kernels import Case, count_kernel_sets, in_one_launch, write_kernels
from eoracc.plugins.tensorrt.plugin import FIELDS, INPUTS, PLUGIN, PLUGIN_VERSION, Kernels
from eoracc.plugins.triton.tactics import SHARED_BYTES
from tests.optional import require
from tests.plugins.tensorrt import frontend

K, N, GROUP = 96, 80, 32
BATCH, TOKENS = [1, 2, 8], [1, 5, 9]
ROWS = BATCH[1] * TOKENS[1]

CASES = {
    "none": Case(
        dtype="float16",
        bits=4,
        block_size=GROUP,
        zero_points=False,
        bias=False,
        lora_a=False,
        down=False,
        aligned=True,
        rank=0,
    ),
    "one_launch": Case(
        dtype="float16",
        bits=3,
        block_size=GROUP,
        zero_points=True,
        bias=True,
        lora_a=True,
        down=False,
        aligned=True,
        rank=16,
    ),
    "down": Case(
        dtype="bfloat16",
        bits=8,
        block_size=GROUP,
        zero_points=False,
        bias=True,
        lora_a=False,
        down=True,
        aligned=True,
        rank=48,
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of every case for capability 8.0, for few rows and for many."""
    require("triton")
    folder: Path = tmp_path_factory.mktemp("bundle")
    write_kernels(folder, CASES.values(), compute_capabilities=["8.0"], rows=[8, 128])
    return folder


def listed(bundle: Path, name: str) -> list[dict[str, Any]]:
    content = json.loads((bundle / "kernels.json").read_text())
    case = CASES[name]
    return [
        one for one in content["kernels"] if (one["bits"], one["dtype"]) == (case.bits, case.dtype)
    ]


def use(name: str, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - shapes by input
    """A node of a case, in a network with a batch and a sequence that a call decides."""
    case = CASES[name]
    half = "HALF" if case.dtype == "float16" else "BF16"
    groups = K // GROUP
    shapes: dict[str, Any] = {
        "X": [BATCH, TOKENS, K],
        "B": [N, groups, GROUP * case.bits // 8],
        "scales": [N, groups],
        "zero_points": [N, groups] if case.zero_points else [],
        "bias": [N] if case.bias else [],
        "lora_a": [case.rank, K] if case.lora_a else [],
        "down": [BATCH, TOKENS, case.rank] if case.down else [],
        "lora_b": [N, case.rank] if case.rank else [],
    }
    shapes |= changes
    namespace, _, op = PLUGIN.partition("::")
    return {
        "creator": [op, PLUGIN_VERSION, namespace],
        "fields": dict(zip(FIELDS, (K, N, case.bits, GROUP), strict=True)),
        "inputs": [
            [shapes[name], "INT8" if name in ("B", "zero_points") else half] for name in INPUTS
        ],
    }


def ask(bundle: Path, folder: Path, *uses: dict[str, Any], capability: str = "8.0") -> Any:  # noqa: ANN401
    require("tensorrt_bindings")
    request = {"bundle": str(bundle), "compute_capability": capability, "uses": list(uses)}
    return frontend.ask(folder, request)


@pytest.mark.parametrize("name", CASES)
def test_nvidias_front_end_takes_the_plugin(name: str, bundle: Path, tmp_path: Path) -> None:
    (answer,) = ask(bundle, tmp_path, use(name))["uses"]
    half = "HALF" if CASES[name].dtype == "float16" else "BF16"
    assert answer["fields"] == list(FIELDS)
    # Of the kind whose kernels go into the engine: nothing of Python runs with it.
    assert answer["kind"] == "_TemplateAOTPlugin"
    assert answer["output"] == [[BATCH[1], TOKENS[1], N], half]
    assert answer["types"] == [
        *("INT8" if name in ("B", "zero_points") else half for name in INPUTS),
        half,
    ]


@pytest.mark.parametrize("name", CASES)
def test_every_tactic_is_launched_as_it_was_compiled(
    name: str, bundle: Path, tmp_path: Path
) -> None:
    (answer,) = ask(bundle, tmp_path, use(name))["uses"]
    kernels = listed(bundle, name)
    assert len(kernels) > 1
    assert set(answer["launches"]) == {str(kernel["tactic"]) for kernel in kernels}
    for kernel in kernels:
        launch = answer["launches"][str(kernel["tactic"])]
        (_, block_m), (_, block_n), _ = kernel["grid"]
        assert launch["launch"] == {
            "grid_x": -(-ROWS // block_m),
            "grid_y": -(-N // block_n),
            "grid_z": 1,
            "block_x": kernel["threads"],
            "block_y": 1,
            "block_z": 1,
            "shared_mem": kernel["shared_bytes"],
        }
        assert launch["numbers"] == [ROWS, N, K, CASES[name].rank, 1]
        assert set(launch["types"]) == {"INT32"}
        assert launch["code"] == (bundle / kernel["file"]).read_text()
        assert f".entry {launch['entry']}(" in launch["code"]
        assert f".reqntid {kernel['threads']}\n" in launch["code"]


@pytest.mark.parametrize("name", CASES)
def test_kernels_take_what_tensorrt_passes(name: str, bundle: Path, tmp_path: Path) -> None:
    """The assembler sees a pointer for each input, the numbers, a pointer for the output."""
    from triton.backends.nvidia.compiler import get_ptxas

    for kernel in listed(bundle, name):
        ptx = (bundle / kernel["file"]).read_text()
        entry = re.search(r"\.entry \w+\(\n(.*?)\n\)", ptx, re.DOTALL)
        assert entry is not None
        types = re.findall(r"\.param (\.u\d+)", entry[1])
        assert types == [".u64"] * len(INPUTS) + [".u32"] * 5 + [".u64"]
        declared = [
            f"{kernel['entry']}_without_{place}" in entry[1] for place in range(len(INPUTS))
        ]
        assert declared == [not shape for shape, _ in use(name)["inputs"]]
        command = [get_ptxas(80).path, "-v", "--gpu-name=sm_80", str(bundle / kernel["file"])]
        done = subprocess.run(
            [*command, "-o", str(tmp_path / "cubin")], capture_output=True, text=True, check=True
        )
        assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr
        assert kernel["shared_bytes"] <= SHARED_BYTES
        assert "mma.sync" in ptx


def test_ptx_of_a_lower_capability_stands_in(bundle: Path, tmp_path: Path) -> None:
    answer = ask(bundle, tmp_path, use("none"), capability="8.6")
    assert all("sm80" in one["entry"] for one in answer["uses"][0]["launches"].values())


def test_a_gpu_of_a_lower_capability_is_refused(bundle: Path, tmp_path: Path) -> None:
    answer = ask(bundle, tmp_path, capability="7.5")
    problem = "has no kernel for compute capability 7.5, only for 8.0"
    assert answer == {"error": f"{bundle / 'kernels.json'}: {problem}"}


def test_code_for_one_architecture_alone_stands_in_for_none(tmp_path: Path) -> None:
    kernels = [
        {"compute_capability": "8.9", "forward_compatible": True},
        {"compute_capability": "9.0", "forward_compatible": False},
    ]
    table = {"format": "eoracc kernels", "schema": 1, "kernels": kernels}
    (tmp_path / "kernels.json").write_text(json.dumps(table))
    own = {wanted: Kernels(tmp_path, wanted).compute_capability for wanted in ("9.0", "10.0")}
    assert own == {"9.0": "9.0", "10.0": "8.9"}


def test_a_table_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kernels.json").write_text('{"format": "eoracc kernels", "schema": 2}')
    with pytest.raises(
        ValueError, match=r"kernels.json: is no table of kernels that this can read"
    ):
        Kernels(tmp_path, "8.0")


@pytest.mark.parametrize("file", ["../k.ptx", "/k.ptx", "a/k.ptx", "link.ptx"])
def test_kernel_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    kernels = [{"compute_capability": "8.9", "forward_compatible": True, "file": file}]
    table = {"format": "eoracc kernels", "schema": 1, "kernels": kernels}
    folder = tmp_path / "bundle"
    (folder / "a").mkdir(parents=True)
    (folder / "kernels.json").write_text(json.dumps(table))
    for path in (tmp_path / "k.ptx", folder / "a" / "k.ptx"):
        path.write_text("elsewhere")
    (folder / "link.ptx").symlink_to(tmp_path / "k.ptx")
    with pytest.raises(ValueError, match=r"kernels\.json: names .*, elsewhere"):
        Kernels(folder, "8.9").ptx(kernels[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lora_a": [32, K], "lora_b": [N, 32]}, "has no kernel for"),
        ({"bias": []}, "has no kernel for"),
    ],
)
def test_a_node_without_a_kernel_is_refused(
    change: dict[str, Any], problem: str, bundle: Path, tmp_path: Path
) -> None:
    answer = ask(bundle, tmp_path, use("one_launch", **change))
    assert problem in answer["error"]


def test_unsigned_bytes_are_refused(bundle: Path, tmp_path: Path) -> None:
    """As INT32 they would reach the plugin, see the parser's test."""
    node = use("none")
    node["inputs"][INPUTS.index("B")][1] = "INT32"
    answer = ask(bundle, tmp_path, node)
    assert "B is DataType.INT32: its bytes must be INT8" in answer["error"]


def test_lower_ranks_share_kernels() -> None:
    one, down = CASES["one_launch"], CASES["down"]
    ranks = {16: one, 32: one, 48: down, 64: down, 256: down}
    cases = [Case(**{**vars(case), "rank": rank}) for rank, case in ranks.items()]
    assert count_kernel_sets(cases, ["8.0", "9.0"]) == 2 * 3
    assert [in_one_launch(rank) for rank in (0, 16, 32, 48)] == [False, True, True, False]


@pytest.mark.parametrize("rank", [8, 272])
def test_ranks_that_no_kernel_takes_are_refused(rank: int) -> None:
    with pytest.raises(PluginError, match=f"rank is {rank}: .* multiples of 16 up to 256"):
        Case(**{**vars(CASES["down"]), "rank": rank})
