"""Where the native op library is, and what it says of itself."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from eoracc.errors import PluginError

__all__ = ["ABI_VERSION", "LibraryInfo", "library_info", "library_path"]

ABI_VERSION = 3
"""Version of the library's C interface that this package was written for."""

_ISA = {
    1: "scalar",
    2: "avx2",
    3: "avx512",
    4: "avx512_vnni",
    5: "amx",
    6: "neon_dotprod",
    7: "neon_i8mm",
}


@dataclass(frozen=True)
class LibraryInfo:
    """What a library says of itself.

    Attributes:
      version: of the eoracc that it was built in.
      abi: of its C interface.
      instruction_set: what it uses on this processor, such as ``avx512_vnni``.
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
    """Load the library at ``path`` and ask it.

    Raises:
      PluginError: it is no library of ours, or of an older or newer interface.
    """
    try:
        library = ctypes.CDLL(str(path))
        library.eoracc_version.restype = ctypes.c_char_p
        info = LibraryInfo(
            version=library.eoracc_version().decode(),
            abi=int(library.eoracc_abi_version()),
            instruction_set=_ISA[int(library.eoracc_best_isa())],
        )
    except (OSError, AttributeError, KeyError) as error:
        raise PluginError(f"{path} is not an eoracc op library: {error}") from error
    if info.abi != ABI_VERSION:
        raise PluginError(
            f"{path} has interface version {info.abi}, this eoracc needs {ABI_VERSION}: "
            "take the library and the package from the same build"
        )
    return info
