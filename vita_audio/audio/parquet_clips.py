"""Clips in the rows of a Parquet file: ``COLUMN/ROW``, where the column holds ``{bytes, path}`` or bytes.

A file is read forwards, in batches of a few rows of one row group, so memory is bounded by a page of the file, which
pyarrow makes of up to 1,024 rows, and not by its row groups. Rows in order cost one pass over the file. A row out of order costs the part of its
row group before it, since Parquet cannot be entered in the middle: half of 100 rows on average in a file that
``datasets`` wrote.
"""

from __future__ import annotations

import bisect
import errno
import os
import re
import threading
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

from vita_audio.extras import needs_extra

_OPEN_FILES = 4
"""Files that are kept open, each with a batch and a page."""
_BATCH_ROWS = 16
_READ_BYTES = 1 << 20
_MEMBER = re.compile(r"(.+)/([0-9]{1,18})")
_lock = threading.Lock()


def read_clip(file: str, member: str) -> bytes:
    """Content of a clip.

    Raises:
        OSError: there is no such clip, or the file is damaged there. Its message is one line.
    """
    with _lock:  # a file has one position
        clips, row = _find(file, member)
        try:
            return clips.read(row)
        except _faults() as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise _damaged(f"{file}/{member}", f"row {row} of {file}", error) from error


def find_clip(file: str, member: str) -> None:
    """Check, without reading it, that a file has a row and a column of audio.

    Raises:
        OSError: it has not.
    """
    with _lock:
        _find(file, member)


def _find(file: str, member: str) -> tuple[_Clips, int]:
    match = _MEMBER.fullmatch(member)
    if match is None:
        raise FileNotFoundError(
            errno.ENOENT, f"{file} has no member {member}; a row is COLUMN/ROW", f"{file}/{member}"
        )
    column, row = match[1], int(match[2])
    stat = os.stat(file)
    clips = _open(file, stat.st_size, stat.st_mtime_ns, column)
    if row >= clips.rows:
        raise FileNotFoundError(
            errno.ENOENT, f"{file} has no row {row}, it has {clips.rows}", f"{file}/{member}"
        )
    return clips, row


@lru_cache(maxsize=_OPEN_FILES)
def _open(file: str, size: int, mtime_ns: int, column: str) -> _Clips:
    try:
        return _Clips(file, column)
    except _faults() as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _damaged(file, file, error) from error


class _Clips:
    """A column of audio, with a position.

    Attributes:
        rows: of the file.
    """

    def __init__(self, file: str, column: str) -> None:
        with needs_extra("train"):
            import pyarrow.parquet
        self._name = f"{file}/{column}"
        self._table = pyarrow.parquet.ParquetFile(file, buffer_size=_READ_BYTES, pre_buffer=False)
        self._column = _audio_column(self._table.schema_arrow, file, column)
        counts = (
            self._table.metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)
        )
        self._ends = list(accumulate(counts))
        self.rows = self._ends[-1] if self._ends else 0
        self._batches: Iterator[Any] | None = None
        self._batch: Any = ()
        self._start = 0  # the row at which the batch starts
        self._group = -1

    def read(self, row: int) -> bytes:
        group = bisect.bisect_right(self._ends, row)
        if self._batches is None or group != self._group or row < self._start:
            self._enter(group)
        try:
            while row >= self._start + len(self._batch):
                assert self._batches is not None
                following = next(self._batches).column(0)
                self._start, self._batch = self._start + len(self._batch), following
        except BaseException:
            self._batches = None  # a damaged page ends the pass
            raise
        value = self._batch[row - self._start].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not content:
            raise FileNotFoundError(
                errno.ENOENT, f"row {row} of {self._name} is empty", f"{self._name}/{row}"
            )
        return bytes(content)

    def _enter(self, group: int) -> None:
        """Go to the first row of a row group."""
        self._batches = self._table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[self._column])
        self._start, self._batch, self._group = ([0, *self._ends])[group], (), group


def _audio_column(schema: Any, file: str, column: str) -> str:
    """Name of the column that holds the content: of a struct only its bytes are read."""
    import pyarrow.types as kinds

    if column not in schema.names:
        raise FileNotFoundError(
            errno.ENOENT, f"{file} has no column {column}, it has {', '.join(schema.names)}", file
        )
    kind = schema.field(column).type
    if kinds.is_struct(kind) and any(kind.field(at).name == "bytes" for at in range(kind.num_fields)):
        return f"{column}.bytes"
    if kinds.is_binary(kind) or kinds.is_large_binary(kind):
        return column
    raise OSError(errno.EINVAL, f"the column {column} of {file} holds {kind}, not audio", file)


def _faults() -> tuple[type[Exception], ...]:
    with needs_extra("train"):
        import pyarrow
    return (OSError, pyarrow.ArrowException)


def _damaged(name: str, what: str, error: Exception) -> OSError:
    number = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
    said = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return OSError(number, said if what in said else f"{what} is damaged: {said}", name)
