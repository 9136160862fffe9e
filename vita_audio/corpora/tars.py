"""Tar archives of audio files, with their transcripts in the archive, in a table, or in a manifest of lhotse.

Archives are read from front to back, compressed or not. Clips of an uncompressed archive can stay in it
(:mod:`vita_audio.audio.archives`); those of a compressed one are written again.
"""

from __future__ import annotations

import posixpath
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Item
from vita_audio.corpora.layouts import (
    Layout,
    SourceError,
    matching,
    missing_column,
    parse_json,
    text_of,
    utterance,
)
from vita_audio.corpora.tables import rows_of

_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")
_MOST_UNPAIRED = 10_000


@dataclass(frozen=True)
class Tars(Layout):
    """Archives whose audio files are named after their utterances.

    Attributes:
        metadata: where the transcripts are: ``json`` (a ``NAME.json`` in the archive for each ``NAME.mp3``), ``table``
            (CSV or TSV), or ``cuts`` (a manifest of lhotse).
        table: pattern of the tables or manifests below SOURCE; ``{stem}`` is the archive's name without suffixes.
        columns: of ``id`` and ``text``, and where there is one of ``speaker``; unused with ``cuts``.
    """

    metadata: str
    table: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metadata not in ("json", "table", "cuts") or (self.metadata != "json" and not self.table):
            raise TypeError("Tars() metadata must be json, or table or cuts with the pattern of a table")

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        if self.metadata == "json":
            yield from self._read_pairs(unit)
            return
        stem = unit.name.split(".tar")[0]
        own = "{stem}" in self.table
        tables = tuple(matching(source, [self.table.replace("{stem}", stem)]))
        if not tables:
            raise SourceError(
                f"{source / self.table.replace('{stem}', stem)}: no such file; {unit.name} needs it"
            )
        transcripts = _transcripts if own else _kept_transcripts
        rows = transcripts(self.metadata, tables, tuple(self.columns.items()))
        found = set()
        for name, clip in tar_clips(unit):
            row = rows.get(name)
            if row is None:
                yield Broken(name, Rejection.NO_TRANSCRIPT, f"{unit.name}: no transcript of {name}")
            else:
                found.add(name)
                yield row if isinstance(row, Broken) else utterance(name, row[0], clip, row[1])
        for name in sorted(rows.keys() - found) if own else ():
            yield Broken(name, Rejection.NO_AUDIO, f"{unit.name}: no recording of {name}")

    def _read_pairs(self, unit: Path) -> Iterator[Item]:
        """WebDataset: the parts of an utterance have one name; either may come first."""
        clips: dict[str, Clip] = {}
        rows: dict[str, Mapping[str, Any] | Broken] = {}
        for name, part in _members(unit, (*_AUDIO, ".json")):
            if isinstance(part, Clip):
                clips[name] = part
            else:
                rows[name] = _json_object(unit, name, part)
            if name in clips and name in rows:
                yield self._utterance(name, clips.pop(name), rows.pop(name))
            if len(clips) + len(rows) > _MOST_UNPAIRED:
                raise SourceError(f"{unit}: recordings and their JSON files have different names")
        for name in sorted(clips):
            yield Broken(name, Rejection.NO_TRANSCRIPT, f"{unit.name}: no transcript of {name}")
        for name in sorted(rows):
            yield Broken(name, Rejection.NO_AUDIO, f"{unit.name}: no recording of {name}")

    def _utterance(self, name: str, clip: Clip, row: Mapping[str, Any] | Broken) -> Item:
        if isinstance(row, Broken):
            return row
        if self.columns["text"] not in row:
            return missing_column(name, self.columns["text"], row)
        return utterance(name, row[self.columns["text"]], clip, _speaker(row, self.columns))


Transcript = tuple[str, str | None] | Broken
"""Text and speaker of an utterance, or why there is none."""


def _transcripts(
    metadata: str, tables: tuple[Path, ...], columns: tuple[tuple[str, str], ...]
) -> dict[str, Transcript]:
    """Transcripts by name of the recording, without suffix."""
    found: dict[str, Transcript] = {}
    for table in tables:
        for name, row in _cuts(table) if metadata == "cuts" else _rows(table, dict(columns)):
            if found.setdefault(name, row) != row:
                found[name] = Broken(name, Rejection.REPEATED, f"{table}: {name} has different transcripts")
    return found


_kept_transcripts = lru_cache(maxsize=1)(_transcripts)
"""The table of all archives, read once per process."""


def _rows(table: Path, columns: Mapping[str, str]) -> Iterator[tuple[str, Transcript]]:
    for number, row in rows_of(table):
        if isinstance(row, Broken):
            yield number, row
            continue
        absent = next((columns[key] for key in ("id", "text") if columns[key] not in row), None)
        if absent is not None:
            raise SourceError(f"{table}: no column {absent!r}; it has {', '.join(map(str, row))}")
        path = PurePath(text_of(row[columns["id"]]))
        name = path.stem if path.suffix.lower() in _AUDIO else path.name
        yield name, (text_of(row[columns["text"]]), _speaker(row, columns))


def _speaker(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    return text_of(row.get(columns.get("speaker", ""))) or None


def _cuts(manifest: Path) -> Iterator[tuple[str, Transcript]]:
    from vita_audio.extras import needs_extra

    with needs_extra("corpora"):
        from lhotse import CutSet
    try:
        for cut in CutSet.from_jsonl_lazy(manifest):
            said = cut.supervisions[0] if cut.supervisions else None
            text = (said.text or "") if said is not None else ""
            yield cut.id, (text, said.speaker if said is not None else None)
    except (OSError, EOFError, ValueError, KeyError, AssertionError, zlib.error) as error:
        raise SourceError(f"{manifest}: not a manifest of lhotse: {error}") from error


def _json_object(unit: Path, name: str, content: bytes) -> Mapping[str, Any] | Broken:
    try:
        row = parse_json(content.removeprefix(BOM_UTF8))
    except ValueError as error:
        return Broken(name, Rejection.BAD_ROW, f"{unit.name}: {name}.json is not JSON: {error}")
    if not isinstance(row, Mapping):
        return Broken(name, Rejection.BAD_ROW, f"{unit.name}: {name}.json must hold an object")
    return row


def tar_clips(archive: Path) -> Iterator[tuple[str, Clip]]:
    """The clips of an archive by their names without suffix.

    Raises:
        SourceError: the archive is damaged from here on.
    """
    for name, part in _members(archive, _AUDIO):
        if isinstance(part, Clip):
            yield name, part


def _members(archive: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Clip | bytes]]:
    """Files of an archive by their names without suffix: clips, and the content of others.

    Raises:
        SourceError: the archive is damaged from here on.
    """
    try:
        with archive.open("rb") as file:
            compressed = file.read(6).startswith(_COMPRESSED)
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                path = PurePath(member.name)
                if path.suffix.lower() in suffixes and not path.name.startswith(".") and not member.isdir():
                    yield path.stem, _content(archive, tar, member, compressed)
                tar.members.clear()  # type: ignore[attr-defined]
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise SourceError(f"{archive}: damaged: {error}") from error


def _content(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, compressed: bool) -> Clip | bytes:
    """A clip that a path can name, else the content. A link is a clip that is missing."""
    suffix, name = PurePath(member.name).suffix, member.name.removeprefix("./")
    named = name == posixpath.normpath(name) and not name.startswith(("/", "../"))
    if suffix.lower() in _AUDIO and ((named and not compressed) or not member.isfile()):
        return Clip(f"{archive}/{name}")
    file = tar.extractfile(member) if member.isfile() else None
    content = file.read() if file is not None else b""
    return Clip(content, suffix=suffix) if suffix.lower() in _AUDIO else content
