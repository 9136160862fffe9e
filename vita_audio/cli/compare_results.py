"""Say which differences between two evaluations are larger than chance, and show the utterances that changed.

    python tools/compare_results.py output/before output/after
    python tools/compare_results.py output/evaluation#stage3-boost output/evaluation#stage4-boost

A and B are output folders of an evaluation; #FOLDER chooses one row by the folder of its utterances. Without it, rows
of equal mode and decoding are compared. Every score of a test set that both have is compared on the items that both
answered: by the paired bootstrap, and by McNemar's exact test for answers that are right or wrong. P-values of several
comparisons are adjusted (Holm), so a difference is reported by chance in at most one of twenty comparisons of two
equal models, however many scores they have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vita_audio.cli.arguments import command_parser
from vita_audio.evaluation.scoreboard import TASKS
from vita_audio.evaluation.statistics import difference, holm
from vita_audio.evaluation.tasks import Column
from vita_audio.files import read_json, read_json_lines

LEVEL = 0.05
Utterances = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> None:
    """Compare two evaluations.

    Raises:
        ValueError: a folder holds no results, or they have nothing in common.
    """
    parser = command_parser(__doc__)
    parser.add_argument("first", metavar="A[#FOLDER]")
    parser.add_argument("second", metavar="B[#FOLDER]")
    parser.add_argument(
        "--show",
        type=int,
        default=5,
        metavar="N",
        help="changed utterances shown for each score (default: 5)",
    )
    args = parser.parse_args(argv)
    print(report(compare(args.first, args.second), args.show))


@dataclass(frozen=True)
class Comparison:
    """One score of a test set in two rows.

    Attributes:
        row: mode and decoding, or the folders of both rows.
        values: the score in A and in B, on the items that both answered.
        limits: 95% interval of the difference B - A.
        chance: adjusted p-value of no difference.
        changed: (id, wanted, said in A, said in B) of the items whose score changed, the largest changes first.
        notes: why the rows may not be comparable.
    """

    row: str
    name: str
    column: Column
    items: int
    values: tuple[float, float]
    limits: tuple[float, float]
    chance: float
    changed: tuple[tuple[str, str, str, str], ...]
    notes: tuple[str, ...]

    @property
    def is_significant(self) -> bool:
        return self.chance < LEVEL


def compare(first: str, second: str) -> list[Comparison]:
    """All comparisons of two evaluations, with p-values adjusted for their number.

    Raises:
        ValueError: a folder holds no results, or they have nothing in common.
    """
    found = [
        comparison
        for name, row, other in _pairs(_rows(first), _rows(second), "#" in first + second)
        for comparison in _compare_rows(name, row, other)
    ]
    if not found:
        raise ValueError(f"{first} and {second} have no score of a test set in common")
    adjusted = holm([one.chance for one in found])
    return [
        Comparison(**{**vars(one), "chance": chance}) for one, chance in zip(found, adjusted, strict=True)
    ]


def report(comparisons: Sequence[Comparison], show: int) -> str:
    """The comparisons as text: real differences first, then the changed utterances of each."""
    lines = []
    for one in sorted(comparisons, key=lambda one: not one.is_significant):
        form, scale = one.column.form, one.column.scale
        a, b, low, high = (format(scale * value, form) for value in (*one.values, *one.limits))
        verdict = "differs" if one.is_significant else "no difference shown"
        lines.append(
            f"{one.row} · {one.name} · {one.column.title}: {a} -> {b} on {one.items} items, "
            f"difference {low} to {high}, p = {one.chance:.2g}: {verdict}"
        )
        lines += [f"  note: {note}" for note in one.notes]
        for id_, wanted, said, said_now in one.changed[:show]:
            lines.append(f"  {id_}: wanted {wanted!r}, A {said!r}, B {said_now!r}")
        if show and len(one.changed) > show:
            lines.append(f"  … and {len(one.changed) - show} more that changed")
    real = sum(one.is_significant for one in comparisons)
    lines.append(f"{real} of {len(comparisons)} scores differ by more than chance")
    return "\n".join(lines)


def _rows(text: str) -> list[tuple[Path, dict[str, Any]]]:
    """The rows of a folder with the folder, or the one that ``#FOLDER`` names."""
    place, _, chosen = text.partition("#")
    folder = Path(place)
    file = folder / "results.json" if folder.is_dir() else folder
    try:
        rows = read_json(file)
    except OSError as error:
        raise ValueError(f"{file}: no results there; give the OUTPUT_DIR of an evaluation") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file}: not a table of results")
    kept = [row for row in rows if not chosen or _folder(row) == chosen]
    if not kept:
        raise ValueError(f"{text}: no row of this name; {file} has {', '.join(map(_folder, rows))}")
    return [(file.parent, row) for row in kept]


def _folder(row: dict[str, Any]) -> str:
    return next((facts["folder"] for facts in row.get("sets", {}).values()), "")


def _pairs(
    first: Sequence[tuple[Path, dict[str, Any]]], second: Sequence[tuple[Path, dict[str, Any]]], chosen: bool
) -> Iterator[tuple[str, tuple[Path, dict[str, Any]], tuple[Path, dict[str, Any]]]]:
    for one in first:
        for other in second:
            modes = [(row["mode"], row["decoding"]) for _, row in (one, other)]
            if chosen and len(first) == len(second) == 1:
                yield f"{_folder(one[1])} -> {_folder(other[1])}", one, other
            elif modes[0] == modes[1]:
                yield f"{one[1]['stage']} -> {other[1]['stage']}, {modes[0][0]}", one, other


def _compare_rows(
    name: str, first: tuple[Path, dict[str, Any]], second: tuple[Path, dict[str, Any]]
) -> Iterator[Comparison]:
    (place, row), (other_place, other_row) = first, second
    for set_name, facts in row["sets"].items():
        other_facts = other_row["sets"].get(set_name)
        if other_facts is None or other_facts["task"] != facts["task"]:
            continue
        ours = _utterances(place / facts["folder"] / f"{set_name}.jsonl")
        theirs = _utterances(other_place / other_facts["folder"] / f"{set_name}.jsonl")
        notes = tuple(
            f"the {what} differs: {facts.get(what)}, {other_facts.get(what)}"
            for what in ("checksum", "recogniser", "normaliser", "speaker")
            if facts.get(what) != other_facts.get(what)
        )
        for column in TASKS[facts["task"]].columns:
            ids = [
                id_
                for id_ in ours.keys() & theirs.keys()
                if column.key in ours[id_]["marks"] and column.key in theirs[id_]["marks"]
            ]
            if len(ids) > 1:
                yield _compare_score(name, set_name, column, sorted(ids), ours, theirs, notes)


def _compare_score(
    row: str,
    name: str,
    column: Column,
    ids: Sequence[str],
    ours: Utterances,
    theirs: Utterances,
    notes: tuple[str, ...],
) -> Comparison:
    first, second = ([said[id_]["marks"][column.key] for id_ in ids] for said in (ours, theirs))
    _, limits, chance = difference(first, second)
    values = tuple(
        math.fsum(above for above, _ in marks) / math.fsum(below for _, below in marks)
        for marks in (first, second)
    )
    moved = {id_: abs(b[0] - a[0]) for id_, a, b in zip(ids, first, second, strict=True) if a != b}
    changed = tuple(
        (id_, _wanted(ours[id_]), _said(ours[id_], column), _said(theirs[id_], column))
        for id_ in sorted(moved, key=lambda id_: -moved[id_])
    )
    return Comparison(row, name, column, len(ids), (values[0], values[1]), limits, chance, changed, notes)


def _utterances(path: Path) -> Utterances:
    """The utterances of a set that did not fail, by id."""
    try:
        return {one["id"]: one for one in read_json_lines(path) if one["failure"] is None}
    except OSError as error:
        raise ValueError(f"{path}: the utterances behind the results are missing; score again") from error


def _wanted(utterance: dict[str, Any]) -> str:
    reference = utterance["reference"]
    return " | ".join(reference) if isinstance(reference, list) else str(reference)


def _said(utterance: dict[str, Any], column: Column) -> str:
    """The text that a score compares: what is heard, or the model's text."""
    is_text = "2t_" in column.key or column.key.startswith("asr")
    said = utterance["text"] if is_text or utterance["heard"] is None else utterance["heard"]
    return str(said)
