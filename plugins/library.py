"""The native op library: its path, its version and the instruction set that it uses."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from eoracc.errors import PluginError

__all__ = ["ABI_VERSION", "INSTRUCTION_SETS", "LibraryInfo", "library_info", "library_path"]

ABI_VERSION = 4
"""Version of the library's C interface that this package was written for."""

INSTRUCTION_SETS: Mapping[str, int] = {
    "scalar": 1,
    "avx2": 2,
    "avx512": 3,
    "avx512_vnni": 4,
    "amx": 5,
    "neon_dotprod": 6,
    "neon_i8mm": 7,
}
"""Instruction sets that the kernels are written for, by the numbers of ``eoracc_isa``."""


@dataclass(frozen=True)
class LibraryInfo:
    """What a library reports about itself.

    Attributes:
      version: version of eoracc that it was built from.
      abi: version of its C interface.
      instruction_set: the one that it uses on this processor, such as ``avx512_vnni``.
    """

    version: str
    abi: int
    instruction_set: str


def library_path() -> Path:
    """The installed native library, a shared object that ONNX Runtime can register.

    Raises:
      PluginError: the package was installed without it.
    """
    path = Path(str(resources.files("eoracc.plugins") / "lib" / "libeoracc_ops.so"))
    if not path.is_file():
        raise PluginError(
            f"{path}: the native op library is missing, since eoracc runs from a source tree that "
            "was not built: run 'make setup' or 'pip install .'"
        )
    return path


def library_info(path: Path) -> LibraryInfo:
    """Load the library at ``path`` and read its version and instruction set.

    Raises:
      PluginError: it is not an eoracc library, or its interface is older or newer.
    """
    names = {number: name for name, number in INSTRUCTION_SETS.items()}
    try:
        library = ctypes.CDLL(str(path))
        library.eoracc_version.restype = ctypes.c_char_p
        info = LibraryInfo(
            version=library.eoracc_version().decode(),
            abi=int(library.eoracc_abi_version()),
            instruction_set=names[int(library.eoracc_best_isa())],
        )
    except (OSError, AttributeError, KeyError) as error:
        raise PluginError(f"{path} is not an eoracc op library: {error}") from error
    if info.abi != ABI_VERSION:
        raise PluginError(
            f"{path} has interface version {info.abi}, this eoracc needs {ABI_VERSION}: "
            "take the library and the package from the same build"
        )
    return info
