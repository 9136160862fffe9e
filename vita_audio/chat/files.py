"""The one reader of sample files: for training, evaluation, demos and inspection alike.

A sample file holds JSON lines, or one JSON array. Its audio paths are absolute, or lie below the data root or
beside the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TypeVar

from vita_audio.chat.sample import Conversation, Sample, SampleError, parse_sample

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PUBLISHED_LINK, _PUBLISHED_FOLDER = "datasets", "data"
_Conversation = TypeVar("_Conversation", bound=Conversation)


class SampleFileError(ValueError):
    """A sample file, or a sample in it, that cannot be used. The message names the file and the line."""


def read_samples(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    need_reply: bool = True,
    answer_lists: bool = False,
) -> Iterator[tuple[int, Sample]]:
    """Checked samples with their numbers: the line's, or the place in an array, from 1.

    Args:
        path: JSON lines, or one JSON array.
        data_root: where relative audio paths start; those not found there are looked for beside the
            file. Defaults to ``$ROOT_PATH``, else the file's folder.
        need_reply, answer_lists: see :func:`~vita_audio.chat.sample.parse_sample`.

    Raises:
        SampleFileError: the file cannot be read or holds no samples, or a sample cannot be used.
    """
    path = Path(path)
    root = default_data_root(path) if data_root is None else data_root
    number = 0
    for number, line in sample_lines(path):
        try:
            sample = parse_sample(line, need_reply=need_reply, answer_lists=answer_lists)
        except SampleError as error:
            raise SampleFileError(f"{path}:{number}: {error}") from error
        yield number, locate(sample, root, path.parent)
    if number == 0:
        raise SampleFileError(f"{path}: holds no samples")


def sample_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The samples of a file as JSON text, not yet checked, with their numbers from 1.

    Bytes that are not UTF-8 become escapes that JSON does not know, so that such a line is refused as
    broken and its neighbours are not.

    Raises:
        SampleFileError: there is no such file, or its array is not JSON.
        OSError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise SampleFileError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if _starts_array(path):
        yield from _array_elements(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if line.strip():
                yield number, line.strip().decode("utf-8", errors="backslashreplace")


def locate(conversation: _Conversation, data_root: str | Path, beside: str | Path) -> _Conversation:
    """The same conversation with the places of its audio files, see :func:`locate_audio`."""
    audios = tuple(
        locate_audio(audio, data_root, beside) if isinstance(audio, str) else audio
        for audio in conversation.audios
    )
    return replace(conversation, audios=audios)


def locate_audio(path: str, data_root: str | Path, beside: str | Path) -> str:
    """Where a file lies that a sample or a mix names: the one rule for relative paths.

    Below the data root ``datasets/…`` also means ``data/…``: in the published code's working folder ``datasets`` is a
    link to ``$ROOT_PATH/data``, and published mixes and JSON files name their files so.

    Args:
        path: as it is written there; an absolute one is returned as it is.
        data_root: folder that relative paths start from.
        beside: folder of the file that names it, where it is looked for next.

    Returns:
        The first place where it exists, or the place below ``data_root`` where it was expected.
    """
    if os.path.isabs(path):
        return path
    expected = os.path.join(data_root, path)
    places = [expected, os.path.join(beside, path)]
    first, *rest = PurePath(path).parts or ("",)
    if first == _PUBLISHED_LINK:
        linked, folder = os.path.join(data_root, _PUBLISHED_LINK), os.path.join(data_root, _PUBLISHED_FOLDER)
        places.insert(1, os.path.join(folder, *rest))
        if os.path.isdir(folder) and not os.path.isdir(linked):
            expected = places[1]
    return next((place for place in places if os.path.exists(place)), expected)


def default_data_root(file: str | Path) -> Path:
    """The data root where none is given: ``$ROOT_PATH``, else the folder of the mix or sample file ``file``."""
    root = os.environ.get("ROOT_PATH")
    return Path(root) if root else Path(file).parent


def _starts_array(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()
    return head.startswith(b"[")


def _array_elements(path: Path) -> Iterator[tuple[int, str]]:
    try:
        elements = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SampleFileError(f"{path}: starts like a JSON array but is none: {error}") from error
    for number, element in enumerate(elements, start=1):
        # Lone surrogates stay escapes: Arrow cannot hold them, and they must cost their sample only.
        line = json.dumps(element, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        yield number, line
