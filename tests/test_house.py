"""The sizes that keep the code readable: short files, thin tools, nothing written twice."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 500
LONGEST_TOOLS = 400
SHARED_LINES = 6


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def code_lines(file: Path) -> list[str]:
    """Lines that say something: no blanks, comments, imports or lone punctuation."""
    lines = [" ".join(line.split()) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if re.search(r"\w", line) and not re.match(r"#|import |from ", line)]


def test_no_file_is_longer_than_five_hundred_lines():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in sources("vita_audio")}
    assert not {str(file): length for file, length in lengths.items() if length > LONGEST_FILE}


def test_the_tools_are_short():
    tools = (ROOT / "tools").glob("*.py")
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in tools) < LONGEST_TOOLS


def test_no_two_files_share_six_lines():
    places: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for file in sources("vita_audio", "tools"):
        lines = code_lines(file)
        for start in range(len(lines) - SHARED_LINES + 1):
            window = tuple(lines[start : start + SHARED_LINES])
            places[window].add(str(file.relative_to(ROOT)))
    shared = {window: files for window, files in places.items() if len(files) > 1}
    assert not shared, next(iter(shared.items()))


def test_a_folder_only_exports_its_public_names():
    """An ``__init__.py`` holds imports, ``__all__`` and what registers or defers them, and defines no class."""
    for file in (ROOT / "vita_audio").rglob("__init__.py"):
        assert not re.search(r"^class ", file.read_text(encoding="utf-8"), re.MULTILINE), file
