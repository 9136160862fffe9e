"""Test items: the questions of a test set with their references.

A test set is a file in the training data's format, read by the common sample reader; the final assistant message is
the reference.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeVar

from vita_audio.audio.archives import file_exists
from vita_audio.chat import Conversation, Sample, read_samples
from vita_audio.chat.prompts import from_sample

Entry = TypeVar("Entry")

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
"""A name of a test set that can name its files as it is."""


@dataclass(frozen=True)
class BenchmarkItem:
    """One test sample.

    Attributes:
        id: names it in result files.
        conversation: the question.
        answer: text of the reference reply.
        answers: accepted answers of a question; just ``answer`` unless the sample lists them.
        reference_audio: the reference reply as speech, if the sample has one.
        voice: a recording of the speaker whose voice the reply should have, if there is one.
    """

    id: str
    conversation: Conversation
    answer: str
    answers: tuple[str, ...]
    reference_audio: str | None
    voice: str | None = None


Items = list[BenchmarkItem]
AnyPath = str | PathLike[str]


def read_test_set(
    path: AnyPath,
    data_root: AnyPath | None = None,
    limit: int | None = None,
    *,
    answer_lists: bool = False,
    check: Callable[[BenchmarkItem], None] | None = None,
) -> Items:
    """Read a test set in the training data's format.

    Args:
        data_root: base folder of relative audio paths; defaults to ``$ROOT_PATH``, else the file's folder.
        limit: maximum number of items, 1 or more, evenly spread over the file.
        answer_lists: accept a list of answers as the content of the last message.
        check: raises ValueError for an item that cannot be scored.

    Raises:
        ValueError: the file is missing or empty, or a line cannot be used; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such test set")
    root = None if data_root is None else Path(data_root)
    samples = list(read_samples(path, root, answer_lists=answer_lists))
    items: Items = []
    for number, sample in every_nth(samples, limit, path):
        try:
            item = _read_item(sample, number)
            if check is not None:
                check(item)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a test sample: {error}") from error
        items.append(item)
    refuse_repeated_ids(items, path)
    return items


def every_nth(entries: list[Entry], limit: int | None, path: Path) -> list[Entry]:
    """At most ``limit`` entries, evenly spread; None: all.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is None or limit >= len(entries):
        return entries
    if limit < 1:
        raise ValueError(f"a limit of {limit} items leaves none of {path}; give 1 or more")
    return [entries[index * len(entries) // limit] for index in range(limit)]


def refuse_repeated_ids(items: Iterable[BenchmarkItem], path: Path) -> None:
    """
    Raises:
        ValueError: two items have one id.
    """
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{path}: id {item.id!r} occurs twice; give each sample its own id")
        seen.add(item.id)


def _read_item(sample: Sample, number: int) -> BenchmarkItem:
    reply = sample.messages[-1]
    if reply.role != "assistant":
        raise ValueError("the last message must be the assistant's, which is the reference")
    conversation = from_sample(sample)
    paths = [audio for audio in sample.audios if isinstance(audio, str)]
    missing = next((path for path in paths if not file_exists(path)), None)
    if missing is not None:
        raise ValueError(f"{missing}: no such audio file")
    answer = reply.text.strip()
    recordings = sample.audios[len(sample.audios) - reply.num_audios :]
    first = sample.messages[0]
    voice = sample.audios[0] if first.role == "system" and first.num_audios else None
    return BenchmarkItem(
        id=sample.id or str(number),
        conversation=conversation,
        answer=answer,
        answers=sample.answers or (answer,),
        reference_audio=str(recordings[-1]) if recordings else None,
        voice=None if voice is None else str(voice),
    )


def file_name(identifier: str) -> str:
    """A file name, without suffix, that is unique to an id on every file system.

    Short ids of lower-case letters, digits, "_" and "." are used unchanged. Others keep their readable
    characters, and a digest of the whole id makes them unique.
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_.]{0,63}", identifier):
        return identifier
    readable = re.sub(r"[^a-z0-9_.]+", "_", identifier.lower())[:40].strip("._")
    digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable}-{digest}" if readable else f"id-{digest}"
