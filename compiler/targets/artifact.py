"""Write an artifact atomically: it appears under its name when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from eoracc import __version__
from eoracc.compiler.targets.file_bytes import folder_bytes
from eoracc.compiler.targets.output_place import check_output, refuse_full_disk, refuse_strangers
from eoracc.compiler.targets.weights_file import write_graph
from eoracc.compiler.targets.wide_scales import wide_scale_bytes
from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.report_file import encode_report
from eoracc.runtime.adapters.adapter import Adapter, check_adapter_name
from eoracc.runtime.adapters.files import encode_adapter
from eoracc.runtime.adapters.slots import parse_slots
from eoracc.runtime.artifact.folder_change import changing
from eoracc.runtime.artifact.folder_exchange import put_in_place
from eoracc.runtime.artifact.genai_files import CONFIG_FILE, read_model_files
from eoracc.runtime.artifact.manifest import (
    MANIFEST_FILE,
    REPORT_FILE,
    Manifest,
    backbone_digest,
    describe_bytes,
    describe_folder,
)
from eoracc.runtime.artifact.onnx_file import MODEL_FILE, parse_onnx
from eoracc.runtime.artifact.staged_folder import staged_folder
from eoracc.runtime.artifact.sync import sync_path
from eoracc.runtime.parity.record import PARITY_FILE
from eoracc.runtime.parity.tokens import TOKENS_FILE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    import onnx_ir as ir

    from eoracc.compiler.report.content import Report
    from eoracc.plugins.operands.low_rank import LowRank
    from eoracc.runtime.artifact.manifest import FileEntry

__all__ = [
    "MODEL_FILE",
    "ArtifactWriter",
    "encoded_json",
    "package_versions",
]

_READER = Reader(ArtifactError, "build the artifact again")

_PACKAGES = ("mobius-onnx", "numpy", "onnx", "onnx-ir", "onnxruntime", "torch", "transformers")


class ArtifactWriter:
    """Collects an artifact's files in a folder beside the output, and moves them there at the end.

    ::

        with ArtifactWriter(output) as writer:
            writer.write_model(lowered)
            ...
            writer.commit(source=..., config=..., parity=...)

    Leaving the context without :meth:`commit`, by whatever exception, leaves nothing behind. What
    a killed process leaves is removed by the next writer for the same output.

    Attributes:
      output: where the artifact will be.
      folder: where its files are collected; valid inside the context.
      report: as :meth:`commit` has written it; None before, or if it was given none.
    """

    folder: Path

    def __init__(self, output: Path, *, force: bool = False) -> None:
        """Check that ``output`` may be written, see :func:`check_output`."""
        check_output(output, force=force)
        self.output = output
        self._force = force
        self.report: Report | None = None
        self._adapters: list[Adapter] = []
        self._is_lean = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        parent = self.output.parent
        missing = [path for path in (parent, *parent.parents) if not path.exists()]
        with ExitStack() as stack:
            try:
                for path in reversed(missing):
                    path.mkdir()
                    stack.callback(_remove_empty, path)
                self.folder = stack.enter_context(staged_folder(self.output))
            except OSError as error:
                raise ArtifactError(f"{self.output}: cannot be made: {error.strerror}") from error
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is not None:
            refuse_full_disk(self.output, error)

    def write_model(self, model: ir.Model, place: str = "") -> Path:
        """Write model.onnx and its weights, in graph order, as one file that can be mapped.

        Args:
          model: the lowered graph.
          place: the folder of the artifact that it goes into; its root unless given.

        Returns:
          Where model.onnx is, until the artifact is committed.

        Raises:
          ArtifactError: the disk has less room than the weights need.
        """
        needed = sum(
            value.const_value.nbytes
            for graph in model.graphs()
            for value in graph.initializers.values()
            if value.const_value is not None
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ArtifactError(
                f"{self.output}: {needed:,} bytes are needed and {free:,} are left on the disk: "
                "free some space or choose another 'output'"
            )
        folder = self.folder / place
        folder.mkdir(exist_ok=True)
        return write_graph(model, folder)

    def copy(self, files: Iterable[Path]) -> None:
        """Copy files into the artifact under their own names, times and owners left out."""
        for path in files:
            shutil.copyfile(path, self.folder / path.name)

    def write_library(self, library: Path) -> str:
        """Copy the native library; returns its name for genai_config.json."""
        self.copy([library])
        return library.name

    def write_genai_config(self, config: Mapping[str, Any]) -> None:
        """Write genai_config.json."""
        self.write_json(CONFIG_FILE, config)

    def write_adapter(
        self, name: str, factors: Mapping[str, LowRank], details: Mapping[str, Any]
    ) -> None:
        """Add an adapter; :meth:`commit` binds it to the backbone and writes it.

        Args:
          name: see :func:`eoracc.runtime.adapters.adapter.check_adapter_name`.
          factors: by linear.
          details: what JSON can hold.

        Raises:
          ArtifactError: the name is none, or taken.
        """
        check_adapter_name(name)
        if any(adapter.name == name for adapter in self._adapters):
            raise ArtifactError(f"{self.output}: has an adapter '{name}' already")
        self._adapters.append(Adapter(name, factors, "", details))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write ``content``; equal content gives equal bytes, and NaN is an error."""
        (self.folder / name).write_bytes(encoded_json(content))

    def leave_out_records(self) -> None:
        """Remove the records of parity, of every target, and of tokens."""
        self._is_lean = True
        for name in (PARITY_FILE, TOKENS_FILE):
            for path in self.folder.rglob(name):
                path.unlink()

    def commit(
        self,
        *,
        source: Mapping[str, str],
        config: Mapping[str, Any],
        parity: Mapping[str, Any],
        packages: Mapping[str, str] | None = None,
        machine: Mapping[str, Any] | None = None,
        report: Report | None = None,
        limit_bytes: int | None = None,
    ) -> Manifest:
        """Write the report and the manifest, and move the finished folder to :attr:`output`.

        Args:
          source: the checkpoint: ``model`` as configured, its ``model_type``, and ``digest`` over
            its weights.
          config: the resolved model.yaml.
          parity: figures of the parity gate.
          packages: versions; None looks them up.
          machine: that the build ran on.
          report: gets the bytes of the folder; None writes none.
          limit_bytes: of all files together; None for no limit.

        Raises:
          ArtifactError: the model does not take an adapter, the folder is beyond its limit, or the
            output cannot be written.
        """
        files = describe_folder(self.folder)
        files |= self._write_adapters(backbone_digest(files))

        def manifest_of(listed: Mapping[str, FileEntry]) -> Manifest:
            return Manifest.of(
                listed,
                source=source,
                config=config,
                packages=package_versions() if packages is None else packages,
                parity=parity,
                machine=machine,
            )

        if report is not None:
            files |= self._write_report(report, files, manifest_of)
        manifest = manifest_of(files)
        (self.folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        self._check_size(limit_bytes)
        umask = os.umask(0)
        os.umask(umask)
        for path in sorted(self.folder.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # safetensors gives 0600
            sync_path(path)
        sync_path(self.folder)
        self._move()
        return manifest

    def _check_size(self, limit_bytes: int | None) -> None:
        total = folder_bytes(self.folder)
        if limit_bytes is not None and total > limit_bytes:
            # The survey is kept: a second build begins with the sweep.
            less = limit_bytes - (total - limit_bytes)
            lean = "" if self._is_lean else ", or build with --lean"
            path = self.folder / MODEL_FILE
            wide = wide_scale_bytes(parse_onnx(path.read_bytes(), path)) if path.exists() else 0
            why = (
                f"scales that float16 cannot hold take {wide:,} more than was planned"
                if wide
                else "its records take more than was planned"
            )
            raise ArtifactError(
                f"{self.output}: its files take {total:,} bytes, more than the 'size' of "
                f"{limit_bytes:,}: {why}: give a 'size' of {max(less, 1):,}, which leaves room "
                f"for that{lean}"
            )

    def _write_report(
        self,
        report: Report,
        files: Mapping[str, FileEntry],
        manifest_of: Callable[[Mapping[str, FileEntry]], Manifest],
    ) -> dict[str, FileEntry]:
        """Write report.json, which counts the bytes of all files, itself and the manifest included.

        Its length depends on the numbers in it. It is encoded again until the length that it counts
        is its own; a number never gets shorter on the way, so that ends.
        """
        from eoracc.compiler.report.folder import with_folder  # noqa: PLC0415 - loads the graph

        path = self.folder / MODEL_FILE
        model = parse_onnx(path.read_bytes(), path) if path.exists() else None
        content = b""
        while True:
            entry = describe_bytes(content)
            listed = {**files, REPORT_FILE: entry}
            sizes = {name: one.size for name, one in listed.items()}
            sizes[MANIFEST_FILE] = len(manifest_of(listed).to_json().encode())
            content = encode_report(with_folder(report, sizes, model).as_dict())
            if len(content) == entry.size:
                break
        self.report = type(report).from_dict(_READER.parse(content, REPORT_FILE))
        (self.folder / REPORT_FILE).write_bytes(content)
        return {REPORT_FILE: describe_bytes(content)}

    def _write_adapters(self, digest: str) -> dict[str, FileEntry]:
        """Write the files of all adapters, for the backbone of that digest."""
        written: dict[str, FileEntry] = {}
        if not self._adapters:
            return written
        path = read_model_files(self.folder).model
        slots = parse_slots(path.read_bytes(), path)
        if slots is None:
            raise ArtifactError(f"{self.output}: the model takes no adapters")
        for adapter in self._adapters:
            for name, content in encode_adapter(replace(adapter, backbone=digest), slots).items():
                (self.folder / name).parent.mkdir(exist_ok=True)
                (self.folder / name).write_bytes(content)
                written[name] = describe_bytes(content)
        return written

    def _move(self) -> None:
        check_output(self.output, force=self._force)
        try:
            if not self.output.exists():
                put_in_place(self.folder, self.output)
                return
            # Whoever reads or changes what is there goes first, and finds the new one afterwards.
            with changing(self.output):
                refuse_strangers(self.output)
                put_in_place(self.folder, self.output)
        except OSError as error:
            refuse_full_disk(self.output, error)
            raise ArtifactError(
                f"{self.output}: cannot be put in its place: {error.strerror}: choose another "
                "'output'"
            ) from error


def encoded_json(content: Mapping[str, Any]) -> bytes:
    """``content`` as the text of a JSON file; equal content gives equal bytes, NaN is an error."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # holds the artifact, or what somebody else has put there meanwhile
        folder.rmdir()


def package_versions() -> dict[str, str]:
    """Versions of eoracc and of the packages that a build's bytes depend on."""
    versions = {"eoracc": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
