"""Kill a process at every file operation of a change, and check what is left.

A warmed process is forked for each operation. The child counts what it does to files and kills
itself by SIGKILL right before the ``n``-th operation: nothing is cleaned up, its locks end. Then

- the artifact is the old one or the new one, and verifies;
- the same change, done again, ends with the new one, byte by byte;
- nothing else is left beside the artifact.

``python -m tests.kills SCENARIO [--every N] [--times N]`` prints figures as JSON; ``--times`` kills
at random times instead. Scenarios are the names in :data:`SCENARIOS`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from eoracc.errors import ArtifactError
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.runtime.artifact import folder_exchange
from eoracc.runtime.artifact.folder_lock import waiting_at_most
from eoracc.runtime.artifact.manifest import MANIFEST_FILE, REPORT_FILE, verify_manifest

__all__ = ["SCENARIOS", "Scenario", "kill_everywhere"]

_CHANGES = {
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
}
"""Audit events of Python that change files; ``open`` does so by its flags."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_OUT = "out"


@dataclass(frozen=True)
class Scenario:
    """A change of the artifact ``out`` in a folder.

    Attributes:
      prepare: fills an empty folder.
      change: changes it; called again after a kill.
      records: files of the artifact whose bytes may differ between two runs.
    """

    prepare: Callable[[Path], None]
    change: Callable[[Path], None]
    records: frozenset[str] = frozenset()

    def content(self, folder: Path) -> Mapping[str, bytes] | None:
        """The artifact's files after its check; None where there is none."""
        if not (folder / _OUT).is_dir():
            # By rights a reader, who finishes what has been interrupted.
            with suppress(ArtifactError):
                verify_manifest(folder / _OUT)
        if not (folder / _OUT).is_dir():
            return None
        verify_manifest(folder / _OUT)
        return {
            path.relative_to(folder / _OUT).as_posix(): (
                b"" if path.name in self.records else path.read_bytes()
            )
            for path in (folder / _OUT).rglob("*")
            if path.is_file()
        }


# --- the kill -------------------------------------------------------------------------------------


def _kill_at(step: int) -> None:
    """Kill this process right before its ``step``-th file operation from now on."""
    count = 0

    def operation() -> None:
        nonlocal count
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and int(arguments[2]) & _WRITES):
            operation()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the function takes
            operation()
            return function(*arguments)

        return call

    # Python has no audit event for these.
    os.fsync = counted(os.fsync)
    folder_exchange._exchange = counted(folder_exchange._exchange)
    sys.addaudithook(audit)


def _run(change: Callable[[], None], *, step: int | None = None, seconds: float = 0) -> bool:
    """Do a change in a child that is killed at a step or after a time; whether it was."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if step is not None:
                _kill_at(step)
            change()
            status = 0
        except BaseException:  # noqa: BLE001 - the child must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(status)
    if step is None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("the change failed without a kill")
    return False


@dataclass
class _Figures:
    kills: int = 0
    old: int = 0
    new: int = 0
    left_over: int = 0
    """Kills after which something lay beside the artifact, until the change was done again."""
    failures: list[str] = field(default_factory=list)


def kill_everywhere(
    scenario: Scenario, *, every: int = 1, times: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Kill at each operation, or at each ``every``-th, or at random ``times``.

    Returns:
      Figures: ``kills``, after how many the artifact was the ``old`` or the ``new`` one, after how
      many something was ``left_over`` before the change was done again, and a sentence for each of
      the ``failures``.
    """
    figures = _Figures()
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        template = work / "template"
        template.mkdir()
        scenario.prepare(template)
        before = scenario.content(template)
        reference = Path(shutil.copytree(template, work / "reference"))
        begun_s = time.monotonic()
        scenario.change(reference)
        whole_s = time.monotonic() - begun_s
        after = scenario.content(reference)
        names = sorted(path.name for path in reference.iterdir())
        # At random in time: a bit longer than the change takes, so that its end is met, too.
        for step in range(times) if times else range(0, 1 << 30, every):
            folder = Path(shutil.copytree(template, work / "killed"))
            # By default arguments: the closure is called in this turn of the loop.
            change = lambda folder=folder: scenario.change(folder)  # noqa: E731
            if times:
                killed = _run(change, seconds=float(generator.uniform(0, 1.1 * whole_s)))
            else:
                killed = _run(change, step=step)
            if not (killed or times):
                break
            figures.kills += 1
            _check(scenario, folder, (before, after), names, step, figures)
            shutil.rmtree(folder)
    return vars(figures)


def _check(
    scenario: Scenario,
    folder: Path,
    allowed: tuple[Mapping[str, bytes] | None, Mapping[str, bytes] | None],
    names: list[str],
    step: int,
    figures: _Figures,
) -> None:
    before, after = allowed
    figures.left_over += sorted(path.name for path in folder.iterdir() if path.name != _OUT) != [
        name for name in names if name != _OUT
    ]
    try:
        found = scenario.content(folder)
        figures.old += found == before
        figures.new += found == after
        if found not in allowed:
            figures.failures.append(f"{step}: neither the old artifact nor the new one")
        # A change that was committed may be refused the second time: it is there already.
        with suppress(ArtifactError):
            scenario.change(folder)
        if scenario.content(folder) != after:
            figures.failures.append(f"{step}: the second run ends differently")
        left = sorted(path.name for path in folder.iterdir())
        # Of a change that is refused since it is there, the work is left for the next --force.
        if [name for name in left if not name.endswith(".work")] != names:
            figures.failures.append(f"{step}: leaves {left}")
    except Exception as error:  # noqa: BLE001 - each is a finding
        figures.failures.append(f"{step}: {type(error).__name__}: {error}")


# --- the changes ----------------------------------------------------------------------------------


def _graph() -> ir.Model:
    """A product with a weight that goes to the data file, and slots for adapters."""
    from tests.slots_artifact import SLOTS

    x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    array = np.arange(256, dtype=np.float32).reshape(64, 4)
    weight = ir.Value(name="weight", const_value=ir.tensor(array, name="weight"))
    product = ir.node("MatMul", [x, weight])
    product.outputs[0].name = "y"
    graph = ir.Graph(
        [x], product.outputs, nodes=[product], initializers=[weight], opset_imports={"": 20}
    )
    model = ir.Model(graph, ir_version=10)
    model.metadata_props[SLOTS_KEY] = AdapterSlots("int8", SLOTS).to_json()
    return model


def _write(folder: Path, *, seed: int, force: bool = False) -> None:
    """Write an artifact of one layer with an adapter, in milliseconds."""
    from eoracc.compiler.targets.artifact import ArtifactWriter
    from tests.slots_artifact import random_factors

    config = {"model": {"context_length": 1, "decoder": {"filename": "model.onnx"}}}
    with ArtifactWriter(folder / _OUT, force=force) as writer:
        writer.write_model(_graph())
        writer.write_genai_config(config)
        writer.write_json(REPORT_FILE, {"adapters": {"perplexity": {}}})
        writer.write_adapter("math", random_factors("int8", seed=seed), {"seed": seed})
        writer.commit(source={"model": "m"}, config={}, parity={}, packages={})


def _replace(folder: Path) -> None:
    _write(folder, seed=2, force=True)


def _replace_by_renames(folder: Path) -> None:
    exchange = folder_exchange._exchange
    folder_exchange._exchange = lambda *_: False
    try:
        _replace(folder)
    finally:
        folder_exchange._exchange = exchange


def _add(folder: Path) -> None:
    from eoracc.runtime.adapters.adapter import Adapter
    from eoracc.runtime.adapters.store import add_adapter
    from eoracc.runtime.artifact.manifest import read_manifest
    from tests.slots_artifact import random_factors

    digest = read_manifest(folder / _OUT).digest
    add_adapter(folder / _OUT, Adapter("code", random_factors("int8", seed=3), digest, {}))


def _remove(folder: Path) -> None:
    from eoracc.runtime.adapters.store import remove_adapter

    remove_adapter(folder / _OUT, "math")


def _exported(folder: Path) -> None:
    from eoracc.compiler.adapters.exchange import export_onnx

    _write(folder, seed=1)
    export_onnx(folder / _OUT, "math", folder / "exported")


def _import(folder: Path) -> None:
    from eoracc.compiler.adapters.exchange import import_adapter
    from eoracc.runtime.adapters.store import add_adapter

    path = folder / "exported" / "math.onnx_adapter"
    add_adapter(folder / _OUT, import_adapter(folder / _OUT, path, "again", None))


def _export(folder: Path) -> None:
    from eoracc.compiler.adapters.exchange import export_onnx

    export_onnx(folder / _OUT, "math", folder / "exported")


def _workspace(folder: Path) -> None:
    from tests.tiny_build import tiny_workspace

    tiny_workspace(folder)


def _save_everything() -> None:
    """Keep work after every level, so that kills meet this, too."""
    from eoracc.compiler.kept.interval import SaveInterval

    SaveInterval.is_due = True  # type: ignore[assignment,method-assign]


def _build(folder: Path, *, force: bool = False) -> None:
    from eoracc.compiler import driver
    from eoracc.compiler.progress import SilentProgress
    from tests.tiny_build import tiny_config

    _save_everything()
    verify = {"windows": 1, "window_length": 16, "parity": False}
    driver.build(
        tiny_config(verify=verify), config_dir=folder, progress=SilentProgress(), force=force
    )


def _built(folder: Path) -> None:
    _workspace(folder)
    _build(folder)


def _rebuild(folder: Path) -> None:
    _build(folder, force=True)


def _solved(folder: Path) -> None:
    from eoracc.compiler.adapters.add import solve_for_artifact
    from eoracc.compiler.config.load import adapter_config
    from eoracc.compiler.progress import SilentProgress

    _save_everything()
    text = {
        "text": str(folder / "text.txt"),
        "samples": 2,
        "sequence_length": 16,
        "rank": 2,
        "verify": {"windows": 1, "window_length": 16},
    }
    solve_for_artifact(
        folder / _OUT,
        "task",
        adapter_config(text),
        data_dir=folder,
        progress=SilentProgress(),
        model=str(folder / "model"),
        parity=False,
    )


_RECORDS = frozenset({MANIFEST_FILE, REPORT_FILE})

SCENARIOS: Mapping[str, Scenario] = {
    "write": Scenario(lambda _: None, lambda folder: _write(folder, seed=1)),
    "replace": Scenario(lambda folder: _write(folder, seed=1), _replace),
    "replace-by-renames": Scenario(lambda folder: _write(folder, seed=1), _replace_by_renames),
    "adapter-add": Scenario(lambda folder: _write(folder, seed=1), _add),
    "adapter-remove": Scenario(lambda folder: _write(folder, seed=1), _remove),
    "adapter-import": Scenario(_exported, _import),
    "adapter-export": Scenario(lambda folder: _write(folder, seed=1), _export),
    "build": Scenario(_workspace, _build, _RECORDS),
    "build-force": Scenario(_built, _rebuild, _RECORDS),
    "adapter-solve": Scenario(_built, _solved, _RECORDS | {"task.json"}),
}


def main() -> int:
    """Print the figures of the scenarios that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--times", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("eoracc").addHandler(logging.NullHandler())
    # A lock that outlives its process is a failure, not a wait.
    with waiting_at_most(5):
        found = {
            name: kill_everywhere(SCENARIOS[name], every=options.every, times=options.times)
            for name in options.scenarios
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
