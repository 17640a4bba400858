"""Links, file names and commands in the documentation resolve."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path

import click
import pytest

from eoracc.compiler.cli import main as cli

ROOT = Path(__file__).parents[1]

PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
)

FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2[^\S\n]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)

FOLDERS = ("benchmarks", "compiler", "docs", "examples", "passes", "plugins", "runtime", "tests")
"""Top-level folders: a code span that starts with one of them is the path of a file."""

PLACEHOLDERS = re.compile(r"[<>*{}$…]")
MODULE = re.compile(r"python3? -m ((?:benchmarks|examples|eoracc|tests)(?:\.\w+)*)")
MAKE = re.compile(r"^(?:\$ )?make ((?:[a-z][a-z0-9-]* ?)+)", re.MULTILINE)
"""A line of code that calls make, with its targets."""
COMMAND_LINE = re.compile(r"^(?:\$ )?eoracc ([a-z].*)$", re.MULTILINE)
CODE_COMMAND = re.compile(r"`eoracc ([a-z][^`\n]*)`")


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code_blocks(text: str) -> str:
    """``text`` less its fenced code blocks, whose brackets are no links."""
    return FENCE.sub("", text)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of ``page``."""
    found: set[str] = set()
    for heading in HEADING.findall(without_code_blocks(text_of(page))):
        plain = LINK.sub("]", heading).replace("[", "").replace("]", "")
        kept = [
            letter
            for letter in plain.strip().lower()
            if letter in "-_ " or unicodedata.category(letter)[0] in "LN"
        ]
        base = anchor = "".join(kept).replace(" ", "-")
        repeat = 0
        while anchor in found:
            repeat += 1
            anchor = f"{base}-{repeat}"
        found.add(anchor)
    return frozenset(found)


def broken_links(page: Path) -> list[str]:
    """Relative links of ``page`` to a file or a heading that does not exist."""
    broken = []
    for target in LINK.findall(CODE.sub("", without_code_blocks(text_of(page)))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            broken.append(target)
    return broken


def is_generated(path: str) -> bool:
    """Whether ``path`` is the output of an example, which a clone does not have."""
    return re.match(r"examples/\w+/(build|data)\b", path) is not None


def missing_files(page: Path) -> list[str]:
    """Files of the repository that ``page`` names in code spans and that do not exist."""
    missing = []
    for span in CODE.findall(without_code_blocks(text_of(page))):
        for word in span.split():
            path = word.partition("::")[0].rstrip(":,;.")
            if not path.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
                continue
            if PLACEHOLDERS.search(path) or is_generated(path):
                continue
            if not (ROOT / path).exists():
                missing.append(path)
    return missing


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_in_code_spans_exist(page: Path) -> None:
    assert missing_files(page) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_modules_that_commands_run_exist(page: Path) -> None:
    for module in MODULE.findall(text_of(page)):
        path = ROOT / module.removeprefix("eoracc.").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    code = [match.group() for match in FENCE.finditer(text_of(page))]
    code += CODE.findall(without_code_blocks(text_of(page)))
    for named in MAKE.findall("\n".join(code)):
        assert set(named.split()) <= targets


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_command_lines_are_those_of_the_command_line(page: Path) -> None:
    blocks = [match.group() for match in FENCE.finditer(text_of(page))]
    lines = COMMAND_LINE.findall("\n".join(blocks).replace("\\\n", " "))
    for line in [*lines, *CODE_COMMAND.findall(without_code_blocks(text_of(page)))]:
        words = line.partition(" #")[0].split()
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            name = words.pop(0)
            assert name in command.commands, line
            command = command.commands[name]
        options = {
            option
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0].rstrip("]") in options, line


def test_the_pass_in_the_guide_is_the_source() -> None:
    guide = text_of(ROOT / "docs" / "passes" / "add_a_pass.md")
    shown = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert shown
    for block in shown:
        assert block in text_of(ROOT / "passes" / "compensate" / "svd.py")


def test_the_checks_see_what_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `heading`, of *two* words\n\n"
        "[good](#a-heading-of-two-words) [bad](#other) [gone](gone.md) [web](https://x.org)\n"
        "`passes/no_such_pass.py`, `passes/<name>.py`, `passes/base.py`\n"
        "```sh\n[not a link](nowhere.md)\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["#other", "gone.md"]
    assert missing_files(page) == ["passes/no_such_pass.py"]
