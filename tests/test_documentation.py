"""The files, tests and messages that the documentation names exist in the repository."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "third_party/README.md")),
]
OF_PYTHON = "No module named"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:vita_audio|tools|scripts|configs|tests|docs)/[\w./*-]*)`", text)
    missing = [path for path in named if not list(REPOSITORY.glob(path.rstrip("/")))]
    assert missing == []


def test_tests_named_as_showing_a_difference_exist():
    """Each as ``FOLDER/test_FILE.py``, alone or with the name of a test or how it begins."""
    page = (REPOSITORY / "docs/differences.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?…?`", page)
    assert len(named) > 25
    missing = []
    for file, name in named:
        path = REPOSITORY / "tests" / file
        if not path.is_file() or f"def {name}" not in path.read_text(encoding="utf-8"):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_messages_that_troubleshooting_explains_exist_in_the_code():
    sources = [
        path.read_text(encoding="utf-8")
        for folder in ("vita_audio", "tools", "scripts")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".sh")
    ]
    # A message may be written in several pieces, and hold values where the page has "…".
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))
    page = (REPOSITORY / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = [
        message
        for row in re.findall(r"^\| (.*?) \| .*\|$", page, flags=re.MULTILINE)
        for message in re.findall(r"`([^`]+ [^`]+)`", row)
        if not message.startswith(OF_PYTHON)
    ]
    assert len(explained) > 10
    unsaid = [
        message for message in explained if not all(part.strip(" :") in said for part in message.split("…"))
    ]
    assert unsaid == []
