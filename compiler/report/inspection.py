"""What is in an artifact or a checkpoint, read from headers and reports; no weight is loaded."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from eoracc.compiler.report.content import LinearReport, Report
from eoracc.compiler.report.folder import folder_kinds
from eoracc.compiler.report.lines import report_lines
from eoracc.documents import Reader
from eoracc.errors import ArtifactError, ModelError
from eoracc.passes.graph.counted import counted
from eoracc.runtime.artifact.authenticity import UNCHECKED, Authenticity
from eoracc.runtime.artifact.folder_change import reading
from eoracc.runtime.artifact.manifest import (
    MANIFEST_FILE,
    REPORT_FILE,
    Manifest,
    describe_file,
    read_listed,
    read_manifest,
)
from eoracc.runtime.artifact.onnx_file import MODEL_FILE, parse_onnx
from eoracc.runtime.artifact.signature import SIGNATURE_FILE
from eoracc.runtime.parity.record_checks import has_record
from eoracc.tensor_files import read_tensor_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["ArtifactSummary", "CheckpointSummary", "TensorSummary", "inspect_path"]

_READER = Reader(ArtifactError, "build the artifact again")
_CHECKPOINT = Reader(ModelError, "fetch it again")


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of a checkpoint.

    Attributes:
      name: as in the file.
      shape: outermost dimension first.
      dtype: as the format names it: ``F32``, ``Q4_1``.
      bytes: as stored.
      file: the file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    file: str


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint: a folder with safetensors files, or a GGUF file.

    Attributes:
      path: the folder or file.
      tensors: in the order of the files.
    """

    path: Path
    tensors: Sequence[TensorSummary]

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "kind": "checkpoint",
            "path": str(self.path),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


@dataclass(frozen=True)
class ArtifactSummary:
    """An artifact.

    Attributes:
      path: its folder.
      manifest: files, source and configuration.
      report: linears, fidelity, parity.
      manifest_sha256: of manifest.json, which stands for all files.
      signature: ``none``, ``unchecked``, or ``valid`` for the key that was given.
      folder_kinds: bytes of all files by :data:`~eoracc.compiler.report.folder.KINDS`.
    """

    path: Path
    manifest: Manifest
    report: Report
    manifest_sha256: str
    signature: Literal["none", "unchecked", "valid"]
    folder_kinds: Mapping[str, int]

    @property
    def folder_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.folder_kinds.values())

    @property
    def has_parity_record(self) -> bool:
        """Whether ``eoracc verify`` has something to compare the outputs with."""
        return has_record(self.manifest)

    @property
    def linear_bytes(self) -> int:
        """Bytes of all compressed linears of decoder blocks."""
        return sum(linear.bytes for linear in self._compressed)

    @property
    def bits_per_weight(self) -> float:
        """Per weight that the original has in them; scales, zero points and factors included."""
        whole = {item.name: item.shape for item in self.report.factorized}
        shapes = {
            linear.factor_of or linear.name: whole.get(str(linear.factor_of), linear.shape)
            for linear in self._compressed
        }
        return 8 * self.linear_bytes / max(sum(map(math.prod, shapes.values())), 1)

    @property
    def _compressed(self) -> list[LinearReport]:
        """Linears of decoder blocks that are quantized, pruned, or a factor of a weight."""
        return counted(
            linear
            for linear in self.report.linears
            if linear.bits is not None or linear.sparsity is not None or linear.factor_of
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        content = self.report.as_dict()
        return {
            "kind": "artifact",
            "path": str(self.path),
            "digest": self.manifest.digest,
            "manifest_sha256": self.manifest_sha256,
            "signature": self.signature,
            "source": dict(self.manifest.source),
            "machine": dict(self.manifest.machine),
            "folder_bytes": self.folder_bytes,
            "folder_kinds": dict(self.folder_kinds),
            "has_parity_record": self.has_parity_record,
            "linear_bytes": self.linear_bytes,
            "bits_per_weight": self.bits_per_weight,
            "files": {name: entry.size for name, entry in self.manifest.files.items()},
            "linears": content["linears"],
            "factorized": content["factorized"],
            "warnings": content["warnings"],
        }


def inspect_path(
    path: Path, authenticity: Authenticity = UNCHECKED
) -> ArtifactSummary | CheckpointSummary:
    """Look into an artifact, a checkpoint folder, or a GGUF file.

    Args:
      path: of one of these.
      authenticity: what an artifact has to be; a checkpoint has no manifest to compare.

    Raises:
      ArtifactError: an artifact is damaged, or not the one asked for.
      ModelError: ``path`` is none of these, or its files are damaged.
    """
    if authenticity != UNCHECKED or (path / MANIFEST_FILE).is_file():
        return _artifact(path, authenticity)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{path}: holds neither {MANIFEST_FILE} nor .safetensors files: give an artifact, "
                "a checkpoint folder or a .gguf file"
            )
        return CheckpointSummary(path, [tensor for file in files for tensor in _safetensors(file)])
    if not path.exists():
        raise ModelError(f"{path}: there is no such file or folder")
    if path.suffix == ".safetensors":
        return CheckpointSummary(path, list(_safetensors(path)))
    if path.suffix == ".gguf":
        return CheckpointSummary(path, list(_gguf(path)))
    raise ModelError(f"{path}: is neither an artifact nor a checkpoint folder nor a .gguf file")


def _artifact(folder: Path, authenticity: Authenticity) -> ArtifactSummary:
    with reading(folder):
        manifest = read_manifest(folder, authenticity)
        content = read_listed(folder, manifest, REPORT_FILE)
        manifest_sha256 = describe_file(folder / MANIFEST_FILE).sha256
        is_signed = (folder / SIGNATURE_FILE).is_file()
        kinds = _folder_kinds(folder, manifest)
    path = folder / REPORT_FILE
    values = _READER.as_object(_READER.parse(content, path), path)
    with _READER.refusing_form(path, "is not the report of a build"):
        report = Report.from_dict(values)
        # Parts that other packages write are plain mappings: whether they can be read shows here.
        report_lines(report)
    checked: Literal["unchecked", "valid"] = (
        "unchecked" if authenticity.public_key is None else "valid"
    )
    return ArtifactSummary(
        folder, manifest, report, manifest_sha256, checked if is_signed else "none", kinds
    )


def _folder_kinds(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Bytes of the files that the manifest lists, and of those that it cannot list."""
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    for name in (MANIFEST_FILE, SIGNATURE_FILE):
        if (folder / name).is_file():
            sizes[name] = (folder / name).stat().st_size
    model = None
    if MODEL_FILE in sizes:
        model = parse_onnx(read_listed(folder, manifest, MODEL_FILE), folder / MODEL_FILE)
    return folder_kinds(sizes, model)


def _safetensors(path: Path) -> Iterator[TensorSummary]:
    for name, entry in read_tensor_header(path, _CHECKPOINT).tensors.items():
        yield TensorSummary(name, entry.shape, entry.dtype, entry.end - entry.begin, path.name)


def _gguf(path: Path) -> Iterator[TensorSummary]:
    from eoracc.compiler.frontend.gguf.reading import open_gguf  # noqa: PLC0415 - slow to import

    for tensor in open_gguf(path).tensors:
        # GGUF lists the innermost dimension first.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        yield TensorSummary(
            tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes), path.name
        )
