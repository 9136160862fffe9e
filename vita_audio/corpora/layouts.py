"""How publishers lay out their files: units of work, and the items of each.

A unit is one file: an archive, a Parquet file, a file of rows. Units are independent, so they can be read by several
processes, and one that was read completely need not be read again. Corpora of single audio files have no such
files; they are listed first, into index files that serve as units (:class:`Listed`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Item, Utterance
from vita_audio.files import read_json_lines, write_json, write_json_lines

_BLOCK = 2000
"""Utterances in an index file: some minutes of work."""
_LISTED = "index.json"


class SourceError(ValueError):
    """A SOURCE that does not hold what the recipe needs. The message names the folder or file, on one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Layout(ABC):
    """A way of laying out a corpus. Options of a recipe are the fields of its dataclass."""

    def units(self, source: Path, patterns: Sequence[str], work: Path) -> list[Path]:
        """The units of work below ``source``, sorted. May write to the folder ``work``.

        Raises:
            SourceError: the layout needs more than the patterns, and it is not there.
        """
        return matching(source, patterns)

    @abstractmethod
    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        """The items of a unit, in its order.

        Raises:
            SourceError: the unit cannot be read further.
        """


def matching(source: Path, patterns: Sequence[str]) -> list[Path]:
    """Files or folders below ``source`` that match a pattern, sorted, without hidden files."""
    found = {path for pattern in patterns for path in glob(pattern, root_dir=source, recursive=True)}
    return sorted(source / path for path in found)


@dataclass(frozen=True, kw_only=True)
class Listed(Layout):
    """A corpus of single audio files, listed into index files of two thousand utterances.

    Attributes:
        every: with a number, every so many-th utterance, in the order of ids, is for the test; 0: none.
        test: read only those, instead of only the others.
        speaker: of utterances that name none.
    """

    every: int = 0
    test: bool = False
    speaker: str | None = None

    def units(self, source: Path, patterns: Sequence[str], work: Path) -> list[Path]:
        folders = matching(source, patterns)
        return blocks(work, lambda: self._entries(folders), _BLOCK) if folders else []

    def _entries(self, folders: list[Path]) -> Iterator[dict[str, Any]]:
        items = sorted((item for folder in folders for item in self.scan(folder)), key=lambda item: item.id)
        for number, item in enumerate(items):
            if not self.every or (number % self.every == 0) == self.test:
                yield _to_dict(item)

    @abstractmethod
    def scan(self, folder: Path) -> Iterator[Utterance | Broken]:
        """The utterances of a matching folder or file, in any order; clips are paths."""

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        for entry in read_json_lines(unit):
            item = _from_dict(entry)
            if isinstance(item, Utterance) and item.speaker is None:
                item = replace(item, speaker=self.speaker)
            yield item


def blocks(work: Path, entries: Callable[[], Iterator[dict[str, Any]]], size: int) -> list[Path]:
    """Entries in files of ``size``, which serve as units; made once per work folder."""
    marker = work / _LISTED
    if not marker.is_file():
        remaining, number = entries(), 0
        while block := list(islice(remaining, size)):
            write_json_lines(work / f"index-{number:06d}.jsonl", block)
            number += 1
        write_json(marker, {"files": number})
    return sorted(work.glob("index-*.jsonl"))


def _to_dict(item: Utterance | Broken) -> dict[str, Any]:
    if isinstance(item, Broken):
        return {"id": item.id, "reason": item.reason, "message": item.message}
    clip = item.clip
    return {
        "id": item.id,
        "text": item.text,
        "speaker": item.speaker,
        "audio": clip.audio,
        "start": clip.start,
        "end": clip.end,
    }


def _from_dict(entry: dict[str, Any]) -> Utterance | Broken:
    if "reason" in entry:
        return Broken(**entry)
    clip = Clip(entry["audio"], entry["start"], entry["end"])
    return Utterance(entry["id"], entry["text"], clip, entry["speaker"])


def text_of(value: Any) -> str:
    """A column's value as text; null is empty."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def utterance(id_: str, text: Any, clip: Clip, speaker: str | None = None) -> Utterance | Broken:
    """An utterance whose transcript comes from a column of any type; only text is one, and null is an empty one."""
    if text is None or isinstance(text, str | bytes):
        return Utterance(id_, text_of(text), clip, speaker)
    return Broken(id_, Rejection.BAD_ROW, f"the transcript of {id_} is {type(text).__name__}, not text")


def parse_json(content: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def missing_column(id_: str, column: str, row: Any) -> Broken:
    """The item for a row without a column that the recipe names."""
    return Broken(id_, Rejection.BAD_ROW, f"no column {column!r}; it has {', '.join(map(str, row))}"[:300])


def layouts() -> dict[str, type[Layout]]:
    """All layouts by name."""
    from vita_audio.corpora.folders import FOLDERS
    from vita_audio.corpora.manifests import LhotseCorpus
    from vita_audio.corpora.tables import AudioTable, SpokenAnswers, Texts
    from vita_audio.corpora.tars import Tars
    from vita_audio.corpora.test_sets import Fleurs, Questions

    return {
        "fleurs": Fleurs,
        "lhotse": LhotseCorpus,
        "parquet": AudioTable,
        "questions": Questions,
        "spoken_qa": SpokenAnswers,
        "tar": Tars,
        "text": Texts,
        **FOLDERS,
    }


def open_layout(name: str, options: dict[str, Any], where: str) -> Layout:
    """A layout with its options.

    Raises:
        SourceError: there is no such layout, or an option is unknown or missing.
    """
    known = layouts()
    if name not in known:
        raise SourceError(f"{where}: unknown layout {name!r}; known: {', '.join(known)}")
    try:
        return known[name](**options)
    except TypeError as error:
        raise SourceError(f"{where}: {name}: {str(error).split('() ')[-1]}") from error
