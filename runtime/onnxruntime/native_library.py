"""Choose the native library that runs an artifact: code of the installed package, if it can.

An artifact brings a library, so that runtimes without eoracc can use its kernels. Loading one runs
code of whoever built the artifact. eoracc therefore loads the library that is installed with it:

- if it equals the artifact's byte for byte, or
- if it knows everything that the graph asks of it. The meaning of an op's attribute, value or input
  never changes under its name (docs/op.md), so a library that knows all of them computes what the
  graph says. ``eoracc verify`` compares the results with PyTorch's, with the library that is
  chosen here.

Otherwise the caller has to trust the artifact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.library import library_path
from eoracc.plugins.op import ATTRIBUTES, CHOICES, DOMAIN, DOMAIN_VERSION, INPUTS
from eoracc.printable import quoted
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.manifest import describe_file, read_listed
from eoracc.runtime.artifact.onnx_file import all_nodes, parse_onnx

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from eoracc.runtime.artifact.manifest import Manifest

__all__ = ["NativeLibrary", "choose_library", "native_path"]

_OWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.ms.internal.nhwc")
"""Domains of the ops that ONNX Runtime has without any library."""


@dataclass(frozen=True)
class NativeLibrary:
    """A native library to register with ONNX Runtime.

    Attributes:
      path: of the library.
      note: why it is not the artifact's own; None if the bytes are the same, or it is.
    """

    path: Path
    note: str | None = None


def choose_library(folder: Path, manifest: Manifest, *, trust: bool) -> NativeLibrary | None:
    """The library for the graph of an artifact; None if the artifact uses none.

    Args:
      folder: the artifact, verified and locked.
      manifest: of the artifact.
      trust: run the artifact's own library where it differs from the installed one.

    Raises:
      ArtifactError: only the artifact's own library could run the graph, and it is not trusted; or
        a file is damaged or not listed.
    """
    files = read_model_files(folder, manifest)
    if files.library is None:
        return None
    own = manifest.files[files.library.relative_to(folder).as_posix()]
    try:
        installed = library_path()
    except PluginError:
        installed = None
    if installed is not None and describe_file(installed) == own:
        return NativeLibrary(installed)
    if trust:
        return NativeLibrary(files.library)
    problem: str | None = "eoracc is installed without a native library"
    if installed is not None:
        name = files.model.relative_to(folder).as_posix()
        model = parse_onnx(read_listed(folder, manifest, name), files.model)
        problem = _beyond_installed(model)
        if problem is None:
            return NativeLibrary(
                installed,
                f"{files.library.name} of the artifact is not the installed library, which knows "
                "all its ops and is used instead: --trust uses the artifact's own",
            )
    raise ArtifactError(
        f"{files.library}: is native code of the artifact's builder, which would be executed, "
        f"since {problem}: add --trust (trust=True) if you trust the builder, or build the "
        "artifact again"
    )


def native_path(library: Path | bool) -> Path | None:
    """The library to register: a given one, the installed one for True, and none for False.

    Raises:
      PluginError: there is no installed one.
    """
    if isinstance(library, bool):
        return library_path() if library else None
    return library


def _beyond_installed(model: onnx.ModelProto) -> str | None:
    """What the graph asks of a library and the installed one does not know; None for nothing."""
    version = max((e.version for e in model.opset_import if e.domain == DOMAIN), default=0)
    if version > DOMAIN_VERSION:
        return f"its ops are of version {version}, and the installed library has {DOMAIN_VERSION}"
    functions = {(function.domain, function.name) for function in model.functions}
    for node in all_nodes(model):
        op = f"{node.domain}::{node.op_type}"
        if node.domain == DOMAIN and node.op_type in ATTRIBUTES:
            unknown = {item.name for item in node.attribute}.difference(ATTRIBUTES[node.op_type])
            if unknown:
                return f"the installed library does not know '{min(unknown)}' of {op}"
            for item in node.attribute:
                if item.name in CHOICES and _value(item) not in CHOICES[item.name]:
                    value = quoted(_value(item))
                    return f"the installed library does not know {item.name} = {value} of {op}"
            if len(node.input) > len(INPUTS[node.op_type]):
                return f"the installed library does not know all inputs of {op}"
        elif node.domain not in _OWN_DOMAINS and (node.domain, node.op_type) not in functions:
            return f"the installed library does not have the op {op}"
    return None


def _value(attribute: onnx.AttributeProto) -> int | str:
    """The value of an attribute of :data:`CHOICES`; of another type it is none of the choices."""
    if attribute.type == attribute.INT:
        return int(attribute.i)
    return attribute.s.decode(errors="replace")
