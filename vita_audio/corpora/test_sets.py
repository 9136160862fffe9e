"""Layouts of public test sets: spoken questions with lists of answers, and FLEURS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vita_audio.constants import AUDIO_TAG
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Dialogue, Item, Utterance
from vita_audio.corpora.layouts import Layout, SourceError, missing_column, text_of
from vita_audio.corpora.tables import rows_of, stored_clip
from vita_audio.corpora.tars import tar_clips

_FLEURS_FIELDS = 4  # id, file name, transcription as written, normalised transcription, and more


@dataclass(frozen=True)
class Questions(Layout):
    """Rows with a spoken question and its accepted answers.

    Attributes:
        columns: of ``question_audio`` and ``answers`` (a text or a list; ``a.b`` is the field ``b`` of column ``a``),
            and where there is one of ``id``.
    """

    columns: Mapping[str, str] = field(default_factory=dict)

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        audio, answers = self.columns["question_audio"], self.columns["answers"]
        read = {name.split(".")[0] for name in self.columns.values()}
        for number, (name, row) in enumerate(rows_of(unit, sorted(read))):
            if isinstance(row, Broken):
                yield row
                continue
            absent = next((column for column in (audio, answers.split(".")[0]) if column not in row), None)
            if absent is not None:
                yield missing_column(name, absent, row)
                continue
            id_ = text_of(row.get(self.columns.get("id", ""))) or name
            clip = stored_clip(row, audio, source, unit, number)
            accepted = _answers(row, answers)
            if clip is None:
                yield Broken(id_, Rejection.NO_AUDIO, f"{unit.name}: the row {name} holds no spoken question")
            elif not accepted:
                yield Broken(id_, Rejection.EMPTY_TEXT, f"{unit.name}: the row {name} has no answer")
            else:
                messages = [
                    {"role": "user", "content": AUDIO_TAG},
                    {"role": "assistant", "content": accepted[0]},
                ]
                yield Dialogue(id_, messages, (clip,), answers=accepted)


def _answers(row: Mapping[str, Any], column: str) -> tuple[str, ...]:
    """The texts of a column, each once, in order."""
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    texts = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in (text_of(one).strip() for one in texts) if text))


@dataclass(frozen=True)
class Fleurs(Layout):
    """FLEURS: ``LANGUAGE/audio/SPLIT.tar.gz`` and, without a header, ``LANGUAGE/SPLIT.tsv``.

    A sentence is read by several speakers; the name of the recording is unique.
    """

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        table = unit.parents[1] / f"{unit.name.split('.tar')[0]}.tsv"
        try:
            lines = table.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"{table}: cannot be read: {error}") from error
        texts = {}
        for number, line in enumerate(lines, start=1):
            fields = line.split("\t")
            if len(fields) < _FLEURS_FIELDS:
                yield Broken(
                    f"line-{number}", Rejection.BAD_ROW, f"{table}:{number}: {len(fields)} fields, not 7"
                )
            else:
                texts[Path(fields[1]).stem] = fields[3]
        found = set()
        for name, clip in tar_clips(unit):
            if name in texts:
                found.add(name)
                yield Utterance(name, texts[name], clip)
            else:
                yield Broken(name, Rejection.NO_TRANSCRIPT, f"{table}: no transcript of {name}")
        for name in sorted(texts.keys() - found):
            yield Broken(name, Rejection.NO_AUDIO, f"{unit.name}: no recording of {name}")
