"""Layouts of rows: JSON, JSON lines, Parquet, CSV and TSV, also inside ZIP archives.

Rows are read one batch at a time, so memory does not depend on the length of a file, except for a JSON array and
for the members of a ZIP archive, which are read whole.
"""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from vita_audio.audio.archives import file_exists
from vita_audio.chat import SampleError, SampleFileError, parse_sample, sample_lines
from vita_audio.constants import AUDIO_TAG
from vita_audio.corpora.cleaning import Rejection
from vita_audio.corpora.items import Broken, Clip, Dialogue, Item
from vita_audio.corpora.layouts import Layout, SourceError, missing_column, parse_json, text_of, utterance

_BATCH_ROWS = 64
_FIELD = re.compile(r"\{(\w+)\}")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_LONGEST_FIELD = 1 << 30
Row = Mapping[str, Any]


def rows_of(file: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row | Broken]]:
    """Rows of a file with their names: the file's stem and a number.

    Args:
        columns: of a Parquet file; others are not read. Empty: all.

    Raises:
        SourceError: the file cannot be read further.
    """
    suffixes = [suffix.lower() for suffix in file.suffixes]
    rows: Iterator[Any]
    if suffixes[-1:] == [".parquet"]:
        rows = _parquet_rows(file, columns)
    elif suffixes[-1:] == [".zip"]:
        rows = _zip_rows(file)
    elif suffixes[-1:] in ([".csv"], [".tsv"]):
        rows = _table_rows(file)
    else:
        rows = _json_rows(file)
    for number, row in enumerate(rows):
        name = f"{file.name.split('.')[0]}-{number:07d}"
        if isinstance(row, Mapping):
            yield name, row
        else:
            fault = str(row) if isinstance(row, ValueError) else f"{type(row).__name__}, not an object"
            yield name, Broken(name, Rejection.BAD_ROW, f"{file}, row {number}: {fault}")


def _parquet_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            known = [column for column in columns if column in table.schema_arrow.names]
            for batch in table.iter_batches(_BATCH_ROWS, columns=known or None):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise SourceError(f"{file}: cannot be read: {str(error).splitlines()[0]}") from error


def _json_rows(file: Path) -> Iterator[Any]:
    try:
        for _, line in sample_lines(file):
            yield _parsed(line)
    except (OSError, SampleFileError) as error:
        raise SourceError(str(error)) from error


def _zip_rows(file: Path) -> Iterator[Any]:
    """Rows of the JSON and JSON-lines members, in the order of their names."""
    try:
        with zipfile.ZipFile(file) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith((".json", ".jsonl")) or PurePath(name).name.startswith("."):
                    continue
                try:
                    content = archive.read(name)
                except (
                    zipfile.BadZipFile,
                    zlib.error,
                    EOFError,
                    RuntimeError,
                ) as error:  # encrypted: RuntimeError
                    yield ValueError(f"{name} cannot be read: {error}")
                else:
                    yield from _member_rows(content)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{file}: cannot be read: {error}") from error


def _member_rows(content: bytes) -> Iterator[Any]:
    text = content.decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        whole = parse_json(text)
    except ValueError:
        yield from (_parsed(line) for line in text.splitlines() if line.strip())
    else:
        yield from whole if isinstance(whole, list) else [whole]


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return ValueError(f"not JSON: {error}")


def _table_rows(file: Path) -> Iterator[Any]:
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as content:
            yield from read_table(content, "\t" if file.suffix.lower() == ".tsv" else None)
    except (OSError, csv.Error) as error:
        raise SourceError(f"{file}: cannot be read: {error}") from error


def read_table(
    content: io.TextIOBase | Sequence[str], delimiter: str | None = None
) -> Iterator[dict[str, Any] | ValueError]:
    """Rows of a table with a header. TSV is read without quotes, as Common Voice and VoxPopuli write it.

    A field that a short row lacks is None. A row that is not UTF-8 is a fault of its own.

    Args:
        delimiter: None: ``,``, ``;`` or ``|``, the one that the header holds most often.

    Raises:
        csv.Error: the header is not UTF-8, or a quote is not closed, so that the rest of the table is one field.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    lines = iter(content)
    header = next(lines, "").rstrip("\r\n")
    delimiter = delimiter or max(",;|", key=header.count)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    names = next(csv.reader([header], delimiter=delimiter, quoting=quoting), [])
    if _NOT_UTF8.search(header):
        raise csv.Error("its header is not UTF-8 text")
    of_row: list[str] = []
    for fields in csv.reader(_recorded(lines, of_row), delimiter=delimiter, quoting=quoting):
        if len(of_row) > 1 and quoting == csv.QUOTE_MINIMAL and sum(line.count('"') for line in of_row) % 2:
            raise csv.Error(f"a quote is not closed in the row {of_row[0].strip()!r:.80}")
        of_row.clear()
        if any(map(_NOT_UTF8.search, fields)):
            yield ValueError("not UTF-8 text")
        elif fields:
            yield {name: fields[at] if at < len(fields) else None for at, name in enumerate(names)}


def _recorded(lines: Iterable[str], record: list[str]) -> Iterator[str]:
    for line in lines:
        record.append(line)
        yield line


@dataclass(frozen=True)
class AudioTable(Layout):
    """Rows with a transcript and the content of an audio file, as ``datasets`` writes them to Parquet.

    Attributes:
        columns: of ``audio`` (``{bytes, path}``) and ``text``, and where there are some of ``id`` and ``speaker``.
    """

    columns: Mapping[str, str]

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        for number, (name, row) in enumerate(rows_of(unit, list(self.columns.values()))):
            if isinstance(row, Broken):
                yield row
                continue
            absent = next(
                (self.columns[key] for key in ("audio", "text") if self.columns[key] not in row), None
            )
            if absent is not None:
                yield missing_column(name, absent, row)
                continue
            id_ = text_of(row.get(self.columns.get("id", ""))) or name
            speaker = text_of(row.get(self.columns.get("speaker", ""))) or None
            clip = stored_clip(row, self.columns["audio"], source, unit, number)
            if clip is None:
                yield Broken(id_, Rejection.NO_AUDIO, f"{unit.name}: the row {name} holds no audio")
            else:
                yield utterance(id_, row[self.columns["text"]], clip, speaker)


def stored_clip(row: Row, column: str, source: Path, unit: Path, number: int) -> Clip | None:
    """The clip of an audio column: its content, or a path below SOURCE; None if it has neither.

    Args:
        number: of the row in its file ``unit``.
    """
    stored = row.get(column)
    if not isinstance(stored, Mapping):
        stored = {"bytes": stored} if isinstance(stored, bytes) else {"path": stored}
    content, path = stored.get("bytes"), stored.get("path")
    suffix = PurePath(path).suffix if isinstance(path, str) else ""
    if isinstance(content, bytes) and content:
        return Clip(
            content, suffix=suffix, row=f"{unit}/{column}/{number}" if unit.suffix == ".parquet" else ""
        )
    return Clip(find_below(source, path)) if isinstance(path, str) and path else None


def find_below(source: Path, path: str) -> str:
    """A file that a corpus names by a path from elsewhere: the longest end of the path that exists below ``source``.

    Folders that were packed as ``FOLDER.tar`` are found without unpacking, with the folder's name in the archive or
    without it. Nothing outside ``source`` is found.

    Returns:
        The path; if nothing exists, where it was expected.
    """
    parts = [part for part in PurePath(os.path.normpath(path)).parts if part not in ("/", "//", "..")]
    for start in range(len(parts)):
        end = parts[start:]
        candidates = [source.joinpath(*end)]
        for at in range(1, len(end)):
            archive = source.joinpath(*end[: at - 1], end[at - 1] + ".tar")
            if archive.is_file():
                candidates += [archive.joinpath(*end[at:]), archive.joinpath(*end[at - 1 :])]
        found = next((candidate for candidate in candidates if file_exists(candidate)), None)
        if found is not None:
            return str(found)
    return str(source.joinpath(*parts))


@dataclass(frozen=True)
class SpokenAnswers(Layout):
    """Spoken questions with their answers.

    Rows are samples in the form of docs/data.md; or conversations whose turns name their recording as ``wavpath``; or
    they have columns. Audio is in the row, or below SOURCE.

    Attributes:
        columns: of ``question`` and ``answer`` (texts), ``question_audio``, and where there are some of
            ``answer_audio`` and ``id``. Without an answer's audio, the answer is text.
    """

    columns: Mapping[str, str] = field(default_factory=dict)

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        for number, (name, row) in enumerate(rows_of(unit, list(self.columns.values()))):
            if isinstance(row, Broken):
                yield row
            elif row.get("messages") or row.get("conversations"):
                yield _sample(name, row, unit, source)
            else:
                yield self._answer(name, row, unit, source, number)

    def _answer(self, name: str, row: Row, unit: Path, source: Path, number: int) -> Item:
        columns = self.columns
        absent = next((key for key in ("answer", "question_audio") if columns.get(key) not in row), None)
        if absent is not None:
            return missing_column(name, columns.get(absent, "messages"), row)
        id_ = text_of(row.get(columns.get("id", ""))) or name
        question = stored_clip(row, columns["question_audio"], source, unit, number)
        answer = stored_clip(row, columns.get("answer_audio", ""), source, unit, number)
        if question is None:
            return Broken(id_, Rejection.NO_AUDIO, f"{unit.name}: the row {name} holds no spoken question")
        text = text_of(row[columns["answer"]]).strip()
        messages = [
            {"role": "user", "content": AUDIO_TAG},
            {"role": "assistant", "content": f"{text}\n{AUDIO_TAG}" if answer is not None else text},
        ]
        asked = text_of(row.get(columns.get("question", ""))) or None
        clips = (question,) if answer is None else (question, answer)
        return Dialogue(id_, messages, clips, (asked, text)[: len(clips)])


def _sample(name: str, row: Row, unit: Path, source: Path) -> Item:
    try:
        sample = parse_sample(_with_audios(row))
    except SampleError as error:
        return Broken(name, error.reason, f"{unit.name}: {name}: {error}")
    messages = [{"role": message.role, "content": message.content} for message in sample.messages]
    clips = tuple(Clip(find_below(source, str(audio))) for audio in sample.audios)
    texts = tuple(
        message.text.strip() or None for message in sample.messages for _ in range(message.num_audios)
    )
    return Dialogue(sample.id or name, messages, clips, texts)


def _with_audios(row: Row) -> Row:
    """AudioQA's turns, which name their recordings, as a sample: questions are heard, answers are text and speech."""
    turns = row.get("conversations") or row.get("messages")
    if not isinstance(turns, list) or not any(
        isinstance(turn, Mapping) and turn.get("wavpath") for turn in turns
    ):
        return row
    messages, audios = [], []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), text_of(turn.get("content", turn.get("value")))
        if turn.get("wavpath"):
            audios.append(str(turn["wavpath"]))
            content = f"{content}\n{AUDIO_TAG}" if role in ("assistant", "gpt") else AUDIO_TAG
        messages.append({"role": role, "content": content})
    return {"id": row.get("id"), "messages": messages, "audios": audios}


Turns = str | Sequence[Mapping[str, str]]
"""A column that holds the conversation, or its turns: see :class:`Texts`."""


@dataclass(frozen=True)
class Texts(Layout):
    """Rows of text, without audio.

    Attributes:
        messages: name of the column that holds the conversation, or a list of turns: ``{ROLE: template}`` with columns
            as ``{NAME}``, or ``{turns: COLUMN}`` for all turns of a column; or ``{first_of: [...]}`` of these, of which
            a row takes the first whose columns it has. A system message without text is left out.
    """

    messages: Turns | Mapping[str, Sequence[Turns]]

    def __post_init__(self) -> None:
        if isinstance(self.messages, Mapping) and list(self.messages) != ["first_of"]:
            raise TypeError("Texts() messages must be a column, a list of turns, or {first_of: [...]}")

    def read(self, unit: Path, source: Path) -> Iterator[Item]:
        forms = self.messages["first_of"] if isinstance(self.messages, Mapping) else [self.messages]
        absent = ""
        for name, row in rows_of(unit):
            if isinstance(row, Broken):
                yield row
                continue
            for form in forms:
                absent = next((column for column in _columns(form) if column not in row), "")
                if not absent:
                    break
            if absent:
                yield missing_column(name, absent, row)
                continue
            try:
                yield Dialogue(name, list(_turns(form, row)))
            except (TypeError, ValueError, KeyError) as error:
                yield Broken(name, Rejection.BAD_ROW, f"{unit.name}: {name}: {error}")


def _columns(form: Turns) -> Iterator[str]:
    if isinstance(form, str):
        yield form
        return
    for turn in form:
        for role, template in turn.items():
            yield from [template] if role == "turns" else _FIELD.findall(template)


def _turns(form: Turns, row: Row) -> Iterator[Mapping[str, str]]:
    if isinstance(form, str):
        yield from listed_turns(row[form])
        return
    for turn in form:
        for role, template in turn.items():
            if role == "turns":
                yield from listed_turns(row[template])
                continue
            content = _FIELD.sub(lambda match: text_of(row[match[1]]), template).strip()
            if content or role != "system":
                yield {"role": role, "content": re.sub(r"\n{3,}", "\n\n", content)}


def listed_turns(value: Any) -> Iterator[Mapping[str, str]]:
    """Turns of a column: messages, a text, texts of user and assistant in turn, or ``{human, assistant}`` pairs.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str):
        yield {"role": "user", "content": value}
        return
    if not isinstance(value, list):
        raise ValueError(f"a conversation must be a list, it is {type(value).__name__}")
    for number, turn in enumerate(value):
        if isinstance(turn, str):
            yield {"role": ("user", "assistant")[number % 2], "content": turn}
        elif isinstance(turn, Mapping) and {"human", "assistant"} <= turn.keys():
            yield {"role": "user", "content": turn["human"]}
            yield {"role": "assistant", "content": turn["assistant"]}
        elif isinstance(turn, Mapping):
            yield turn
        else:
            raise ValueError(f"turn {number} is {type(turn).__name__}")
