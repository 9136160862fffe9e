"""The score table: one row per checkpoint and mode, shown as one narrow table per test set.

``scores.json`` holds the rows. A row names its test sets (``sets``) and holds their scores under the keys of their
tasks, such as ``asr_wer``; if a task has several sets, the set's name precedes the key:
``librispeech.asr_wer``. Scores are not pooled over sets. ``scores.md`` shows the same in 80 columns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vita_audio.evaluation.speed import SPEED_COLUMNS
from vita_audio.evaluation.tasks import (
    SPEECH_QA,
    TEXT_QA,
    Column,
    SeedTTS,
    SpeechRecognition,
    SpeechSynthesis,
    Task,
)
from vita_audio.files import write_json, write_text

Row = dict[str, Any]

TASKS: dict[str, Task] = {
    task.name: task for task in (SpeechRecognition(), SpeechSynthesis(), SeedTTS("en"), SPEECH_QA, TEXT_QA)
}
_NAMES = (Column("stage", "stage", ""), Column("mode", "mode", ""))
_DECODING = Column("decoding", "decoding", "")
_WIDTH = 80

LEGEND = (
    "ASR: the model's text. TTS: the recogniser's transcript of the model's speech; codec floor: of the reference "
    "recordings after encoding and decoding; natural: of the recordings themselves. Replies without speech count "
    "as wholly wrong. QA: the answer occurs in the text (S→T, T→T) or in the transcript of the speech (S→S, T→S), "
    "by the published rule and by whole words. Speed: one reply at a time after a warm-up; "
    "first chunk: from the finished prompt to the codes of the first audio chunk; first sound: from "
    "the question to the first samples."
)


@dataclass(frozen=True)
class ScoreTable:
    """The scores of one test set, or the speeds.

    Attributes:
        heading: name of the task, such as ``ASR``; empty for speeds.
        name: name of the test set; empty for speeds and if rows do not state it.
        items: number of items in the test set; None if rows do not state it.
    """

    heading: str
    name: str
    items: int | None
    columns: tuple[Column, ...]

    @property
    def title(self) -> str:
        count = "" if self.items is None else f"{self.items} item{'s' * (self.items != 1)}"
        return " · ".join(part for part in (self.heading or "speed", self.name, count) if part)


def set_keys(scores: Mapping[str, Any], name: str, alone: bool) -> Row:
    """Scores of a test set under their keys in a row.

    Args:
        alone: whether the task has no other test set.
    """
    return {key if alone else f"{name}.{key}": value for key, value in scores.items()}


def tables(rows: Sequence[Row]) -> list[ScoreTable]:
    """A table for each test set that any row has scores for, and one for speeds."""
    found = [
        ScoreTable(TASKS[task].title, name, items, _columns(TASKS[task], name, alone))
        for task, name, items, alone in _sets(rows)
    ]
    found.append(ScoreTable("", "", None, SPEED_COLUMNS))
    return [
        table
        for table in found
        if any(row.get(column.key) is not None for row in rows for column in table.columns)
    ]


def columns(rows: Sequence[Row]) -> list[Column]:
    """All columns that any row has a value for, with self-contained titles."""
    shown = [*_row_names(rows)]
    for table in tables(rows):
        several = sum(other.heading == table.heading for other in tables(rows)) > 1
        words = f"{table.heading} {table.name}" if several else table.heading
        shown += [replace(column, title=f"{words} {column.title}".strip()) for column in table.columns]
    return [column for column in shown if any(row.get(column.key) is not None for row in rows)]


def markdown(rows: Sequence[Row]) -> str:
    """The tables, as Markdown that is also readable as plain text, and a legend of their columns."""
    parts = ["\n".join(_lines(table, rows)) for table in tables(rows)]
    notes = _notes(rows)
    if notes:
        parts.append(
            "\n".join(
                textwrap.fill(note, _WIDTH, initial_indent="* ", subsequent_indent="  ") for note in notes
            )
        )
    return "\n\n".join([*parts, textwrap.fill(LEGEND, _WIDTH)]) + "\n"


def write_table(folder: Path, rows: Sequence[Row]) -> Path:
    """Write ``scores.json`` and ``scores.md``. Returns the path of the latter."""
    write_json(folder / "scores.json", list(rows))
    write_text(folder / "scores.md", markdown(rows))
    return folder / "scores.md"


def _notes(rows: Sequence[Row]) -> list[str]:
    """Notes for readers, each once, with the test sets that it applies to."""
    sets: dict[str, list[str]] = {}
    for name, _, note in (note.partition(": ") for row in rows for note in row.get("notes", ())):
        if name not in sets.setdefault(note, []):
            sets[note].append(name)
    return [f"{', '.join(names)}: {note}" for note, names in sets.items()]


def _sets(rows: Sequence[Row]) -> Iterator[tuple[str, str, int | None, bool]]:
    """Task, name, number of items of each test set, and whether it is the task's only one."""
    known = {name: facts for row in rows for name, facts in row.get("sets", {}).items()}
    for task in TASKS.values():
        names = [name for name, facts in known.items() if facts["task"] == task.name]
        for name in names:
            yield task.name, name, known[name]["items"], len(names) == 1
        if not names:
            yield task.name, "", None, True


def _columns(task: Task, name: str, alone: bool) -> tuple[Column, ...]:
    return tuple(
        replace(column, key=next(iter(set_keys({column.key: None}, name, alone)))) for column in task.columns
    )


def _row_names(rows: Sequence[Row]) -> tuple[Column, ...]:
    return (*_NAMES, _DECODING) if any(row.get("decoding", "greedy") != "greedy" for row in rows) else _NAMES


def _lines(table: ScoreTable, rows: Sequence[Row]) -> list[str]:
    shown = [column for column in table.columns if any(row.get(column.key) is not None for row in rows)]
    scored = [row for row in rows if any(row.get(column.key) is not None for column in shown)]
    names = _row_names(rows)
    cells = [[column.title for column in (*names, *shown)]]
    cells += [[column.cell(row) for column in (*names, *shown)] for row in scored]
    widths = [max(len(line[index]) for line in cells) for index in range(len(cells[0]))]
    rule = [
        ("-" * width if index < len(names) else "-" * (width - 1) + ":") for index, width in enumerate(widths)
    ]
    padded = [
        [
            cell.ljust(width) if index < len(names) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (cells[0], rule, *cells[1:])
    ]
    return [f"### {table.title}", "", *(f"| {' | '.join(line)} |" for line in padded)]
