"""Quality against speed: the rows of a table as one table and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vita_audio.evaluation.figures import save_figure, tradeoff_figure
from vita_audio.evaluation.scoreboard import Row, ScoreTable, interval_of, interval_text, tables
from vita_audio.evaluation.speed import SPEED_COLUMNS
from vita_audio.evaluation.tasks import Column
from vita_audio.files import write_text

NAME = "tradeoff"
"""Of its files, without suffix."""
_SPEED, _FIRST_CHUNK = SPEED_COLUMNS[:2]
_SCORES = ("asr_wer", "tts_wer", "seed_tts_wer", "sqa_s2s_accuracy", "text_qa_t2t_accuracy")
"""The score of each task that is set against speed."""


def write_tradeoff(folder: Path, rows: Sequence[Row]) -> Path:
    """Write ``tradeoff.md``, ``.png`` and ``.svg``; returns the path of the first.

    Raises:
        ValueError: no row has a speed, or none a score.
    """
    timed = _with_speed(rows)
    scores = [(table, column) for table in tables(rows) for column in table.columns if _is_shown(column)]
    if not timed or not scores:
        raise ValueError("quality against speed needs a test set with speech, and --speed_items of 1 or more")
    write_text(folder / f"{NAME}.md", _markdown(timed, scores))
    stages = {row["stage"] for row in timed}
    panels = {
        f"{table.title}: {column.title}": [
            _point(row, table, column, alone=len(stages) == 1)
            for row in timed
            if row.get(column.key) is not None
        ]
        for table, column in scores
    }
    save_figure(tradeoff_figure(panels, _SPEED.title), folder / NAME)
    return folder / f"{NAME}.md"


def _with_speed(rows: Sequence[Row]) -> list[Row]:
    """The rows of known speed. A mode is timed once, in its first decoding."""
    keys = (_SPEED.key, _FIRST_CHUNK.key)
    speeds = {
        (row["stage"], row["mode"]): {key: row.get(key) for key in keys}
        for row in rows
        if row.get(_SPEED.key) is not None
    }
    return [row | speeds[row["stage"], row["mode"]] for row in rows if (row["stage"], row["mode"]) in speeds]


def _is_shown(column: Column) -> bool:
    return column.key.rpartition(".")[2] in _SCORES


def _point(row: Row, table: ScoreTable, column: Column, *, alone: bool) -> dict[str, Any]:
    limits = interval_of(row, table.name, column.key)
    name = row["mode"] if alone else f"{row['stage']} {row['mode']}"
    return {
        "label": name if row.get("decoding", "greedy") == "greedy" else f"{name}, {row['decoding']}",
        "speed": row[_SPEED.key],
        "value": column.scale * row[column.key],
        "interval": None if limits is None else [column.scale * limit for limit in limits],
    }


def _markdown(rows: Sequence[Row], scores: Sequence[tuple[ScoreTable, Column]]) -> str:
    titles = [f"{table.heading} {table.name} {column.title}" for table, column in scores]
    names = ["checkpoint", "mode", "decoding"]
    lines = [
        "### Quality against speed",
        "",
        f"| {' | '.join([*names, _SPEED.title, '× Vanilla', _FIRST_CHUNK.title, *titles])} |",
        f"| {' | '.join(['---'] * 3 + ['---:'] * (3 + len(titles)))} |",
    ]
    for row in rows:
        vanilla = next(
            (one for one in rows if (one["stage"], one["mode"]) == (row["stage"], "vanilla")), None
        )
        gain = "–" if vanilla is None else f"{row[_SPEED.key] / vanilla[_SPEED.key]:.2f}"
        cells = [row["stage"], row["mode"], row.get("decoding", "greedy"), _SPEED.cell(row), gain]
        cells += [_FIRST_CHUNK.cell(row)]
        for _, column in scores:
            limits = interval_text(column, row)
            cells.append(f"{column.cell(row)}{f' ({limits})' if limits else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In brackets: 95% intervals. Speed: one reply at a time, median.", ""])
