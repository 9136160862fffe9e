"""The score table: one row per checkpoint and mode, shown as one narrow table per test set.

``results.json`` holds the rows. A row names its test sets (``sets``, with all that their scores depend on) and holds
their scores under the keys of their tasks, such as ``asr_wer``; if a task has several sets, the set's name precedes
the key: ``librispeech.asr_wer``. Scores are not pooled over sets. ``results.md`` shows the same in 80 columns, with
half the width of the 95% interval where there is room, and below ours the rows that others published.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vita_audio.evaluation.pages import write_results, write_utterances
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


def published_rows(name: str, rows: Sequence[Row]) -> list[Row]:
    """What others published on a test set, as rows, each once."""
    found: dict[str, Row] = {}
    for row in rows:
        for entry in row.get("sets", {}).get(name, {}).get("published", ()):
            prefix = f"{name}." if any(key.startswith(f"{name}.") for key in row) else ""
            scores = {f"{prefix}{key}": value for key, value in entry["scores"].items()}
            found[str(entry)] = {"stage": entry["model"], "mode": entry.get("mode", "published"), **scores}
    return list(found.values())


def interval_of(row: Row, name: str, key: str) -> Sequence[float] | None:
    """The 95% interval of a score of a test set, as fractions; None if there is none."""
    found: Sequence[float] | None = (
        row.get("sets", {}).get(name, {}).get("intervals", {}).get(key.removeprefix(f"{name}."))
    )
    return found


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
    """Write ``results.json``, ``results.md`` and ``results.html``. Returns the path of the second."""
    write_json(folder / "results.json", list(rows))
    write_pages(folder, rows)
    write_text(folder / "results.md", markdown(rows))
    return folder / "results.md"


def write_pages(folder: Path, rows: Sequence[Row]) -> None:
    """Write ``results.html`` and a page with the utterances of every set of every row."""
    shown = []
    for table in tables(rows):
        scores = _shown_columns(table, rows)
        columns = (*_row_names(rows), *scores)
        ours = [row for row in rows if any(row.get(column.key) is not None for column in scores)]
        lines = [
            {
                "cells": [_html_cell(column, row) for column in columns],
                "page": _page(folder, row, table),
                "published": row not in ours,
            }
            for row in [*ours, *published_rows(table.name, rows)]
        ]
        shown.append({"title": table.title, "columns": columns, "rows": lines})
    write_results(folder, "Results", shown, _notes(rows))


def interval_text(column: Column, row: Row) -> str:
    """The ends of a score's 95% interval, as shown; empty if there is none."""
    name, _, key = column.key.rpartition(".")
    sets = [name] if name else list(row.get("sets", {}))
    limits = next((found for one in sets if (found := interval_of(row, one, key)) is not None), ())
    return " – ".join(format(column.scale * limit, column.form) for limit in limits)


def _html_cell(column: Column, row: Row) -> dict[str, Any]:
    return {"text": column.cell(row), "is_text": column.is_text, "interval": interval_text(column, row)}


def _page(folder: Path, row: Row, table: ScoreTable) -> str | None:
    """The path of the page with a set's utterances, relative to ``folder``."""
    place = row.get("sets", {}).get(table.name, {}).get("folder")
    if place is None:
        return None
    title = f"{table.title} · {row['stage']}, {row['mode']}"
    page = write_utterances(folder / place, table.name, title, folder)
    return None if page is None else page.relative_to(folder).as_posix()


def _notes(rows: Sequence[Row]) -> list[str]:
    """Notes for readers, each once, with the test sets that it applies to."""
    sets: dict[str, list[str]] = {}
    for name, _, note in (note.partition(": ") for row in rows for note in row.get("notes", ())):
        if name not in sets.setdefault(note, []):
            sets[note].append(name)
    sources = {
        f"{name}: {entry['model']}, published: {entry['source']}": None
        for row in rows
        for name, facts in row.get("sets", {}).items()
        for entry in facts.get("published", ())
    }
    return [*(f"{', '.join(names)}: {note}" for note, names in sets.items()), *sources]


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
    lines = _table(table, rows, with_intervals=True)
    return lines if max(map(len, lines)) <= _WIDTH else _table(table, rows, with_intervals=False)


def _shown_columns(table: ScoreTable, rows: Sequence[Row]) -> list[Column]:
    return [column for column in table.columns if any(row.get(column.key) is not None for row in rows)]


def _cell(column: Column, row: Row, name: str, with_intervals: bool) -> str:
    """A score and half the width of its interval."""
    text = column.cell(row)
    limits = interval_of(row, name, column.key) if with_intervals else None
    if limits is None or column.is_text:
        return text
    return f"{text} ±{format(column.scale * (limits[1] - limits[0]) / 2, column.form)}"


def _table(table: ScoreTable, rows: Sequence[Row], with_intervals: bool) -> list[str]:
    shown = _shown_columns(table, rows)
    scored = [row for row in rows if any(row.get(column.key) is not None for column in shown)]
    scored += published_rows(table.name, rows)
    names = _row_names(rows)
    cells = [[column.title for column in (*names, *shown)]]
    cells += [
        [_cell(column, row, table.name, with_intervals) for column in (*names, *shown)] for row in scored
    ]
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
