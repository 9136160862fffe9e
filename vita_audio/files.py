"""Atomic file writes, JSON lines, and digests of file content.

A process may be killed while it writes. Everything here is written under a temporary name next to its
target and then renamed, so a reader sees the old file or the new one, never a part. The temporary name
starts with a dot and ends in ``.tmp``, and no two writers share one.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 1 << 16


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` when the block ends without an error.

    Missing parent folders are created. After an error the temporary file is deleted and ``path`` is unchanged.

    Raises:
        OSError: the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically. A lone surrogate is written as its escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file atomically.

    Raises:
        TypeError: the value contains a type that JSON cannot represent.
    """
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def parse_settings(text: str) -> Any:
    """Parse JSON written by a person: a duplicate key is an error.

    Raises:
        ValueError: it is not JSON, or an object has a key twice.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"{key!r} is given twice")
            content[key] = value
        return content

    try:
        return json.loads(text, object_pairs_hook=without_repeats)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def json_lines(values: Iterable[Any]) -> str:
    """One line for each value."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def write_json_lines(path: str | Path, values: Iterable[Any]) -> None:
    """Write a file with one JSON value per line, atomically."""
    write_text(path, json_lines(values))


def read_json_lines(path: str | Path) -> Iterator[Any]:
    """The values of a file of JSON lines; blank lines are skipped.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not JSON; the message names file and line.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON ({error})") from error


def content_fingerprint(paths: Iterable[Path]) -> str:
    """A short digest of files, over their sizes and evenly spaced blocks: gigabytes take milliseconds."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            last = max(0, size - _BLOCK_BYTES)
            for index in range(_SAMPLED_BLOCKS):
                file.seek(last * index // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
