"""The only reader of sample files, shared by training, evaluation, demos and inspection.

A sample file holds JSON lines or one JSON array, plain or compressed (gzip, bzip2, xz, Zstandard). How its
audio paths are resolved is described in :mod:`vita_audio.chat.paths`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from vita_audio.chat.paths import default_data_root, locate_file
from vita_audio.chat.sample import Conversation, Sample, SampleError, parse_sample

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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
    """Checked samples, numbered from 1 by line or by position in the array.

    Args:
        path: JSON lines, or one JSON array.
        data_root: base of relative audio paths; those not found there are looked up next to the
            file. Defaults to ``$ROOT_PATH``, else the file's folder.
        need_reply: see :func:`~vita_audio.chat.sample.parse_sample`.
        answer_lists: see there.

    Raises:
        SampleFileError: the file cannot be read or holds no samples, or a sample cannot be used.
    """
    path = Path(path)
    root = default_data_root(path) if data_root is None else data_root
    number = 0
    try:
        for number, line in sample_lines(path):
            try:
                sample = parse_sample(line, need_reply=need_reply, answer_lists=answer_lists)
            except SampleError as error:
                raise SampleFileError(f"{path}:{number}: {error}") from error
            yield number, locate(sample, root, path.parent)
    except OSError as error:
        raise SampleFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    if number == 0:
        raise SampleFileError(f"{path}: holds no samples")


def sample_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The samples of a file as JSON text, not yet checked, with their numbers from 1.

    Bytes that are not UTF-8 become escapes that are invalid in JSON, so only the broken line is refused
    and not its neighbours.

    Raises:
        SampleFileError: the file does not exist, its format is unknown, its array is not JSON, or its
            compressed data is damaged.
        OSError: the disk or the system failed.
    """
    path = Path(path)
    if not path.is_file():
        raise SampleFileError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    _check_suffix(path)
    with path.open("rb") as raw, _decompressed(path, raw) as file:
        try:
            yield from _lines_or_elements(path, file)
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise SampleFileError(f"{path}: its compressed data is damaged or cut off: {error}") from error
        except OSError as error:
            if error.errno is None:  # how gzip, bzip2 and Zstandard name damaged data
                raise SampleFileError(
                    f"{path}: its compressed data is damaged or cut off: {error}"
                ) from error
            raise


def locate(conversation: _Conversation, data_root: str | Path, beside: str | Path) -> _Conversation:
    """The same conversation with its audio paths resolved, see :func:`~vita_audio.chat.paths.locate_file`."""
    audios = tuple(
        locate_file(audio, data_root, beside) if isinstance(audio, str) else audio
        for audio in conversation.audios
    )
    return replace(conversation, audios=audios)


def _check_suffix(path: Path) -> None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    if not suffixes or suffixes[-1] in JSON_SUFFIXES:
        return
    if suffixes[-1] == ".parquet":
        raise SampleFileError(f"{path}: Parquet is read in data mixes only; give JSON lines here")
    raise SampleFileError(
        f"{path}: {suffixes[-1]} files are not read; convert it to one of "
        f"{', '.join(JSON_SUFFIXES)} (also with {', '.join(COMPRESSED_SUFFIXES)}), or to .parquet for a data mix"
    )


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """The file's content. The first bytes decide, since some tools decompress a file and keep its name."""
    head = raw.read(6)
    raw.seek(0)
    if head.startswith((b"PK\x03\x04", b"PAR1")):
        kind = "Parquet" if head.startswith(b"PAR1") else "a ZIP archive or spreadsheet"
        raise SampleFileError(f"{path}: its content is {kind}, not JSON; convert it to JSON lines")
    for magic, opened in _OPENERS.items():
        if head.startswith(magic):
            try:
                content: IO[bytes] = opened(raw)
                return content
            except ImportError as error:
                raise SampleFileError(
                    f"{path}: Zstandard needs pyarrow (pip install pyarrow); or compress the file with gzip"
                ) from error
    return raw


def _zstandard(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow  # not required for inference

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


_OPENERS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstandard,
}


def _lines_or_elements(path: Path, file: IO[bytes]) -> Iterator[tuple[int, str]]:
    blank_so_far = True
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        line = line.strip()
        if blank_so_far and line.startswith(b"["):
            yield from _array_elements(path, line + b"\n" + file.read())
            return
        if line:
            blank_so_far = False
            yield number, line.decode("utf-8", errors="backslashreplace")


def _array_elements(path: Path, array: bytes) -> Iterator[tuple[int, str]]:
    try:
        elements = json.loads(array.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SampleFileError(f"{path}: starts like a JSON array but is not one: {error}") from error
    for number, element in enumerate(elements, start=1):
        # Lone surrogates stay escapes: Arrow cannot hold them, and they must invalidate only their own sample.
        line = json.dumps(element, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        yield number, line
