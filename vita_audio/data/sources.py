"""Data files as random-access rows of raw samples, memory-mapped through ``datasets``.

JSON lines are kept as lines and parsed one by one when they are needed, so a broken line, or a column
that changes its type, costs that sample and not the file. The first use of a file converts it into an
Arrow file in the cache of ``datasets`` (HF_DATASETS_CACHE); later runs, other ranks and the workers map
that. Parquet files keep their columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from vita_audio.chat import Reason, SampleError, sample_lines

_LINE = "line"
_SAMPLE_COLUMNS = ("messages", "conversations", "audios")

logger = logging.getLogger(__name__)


class SourceError(ValueError):
    """A data file that cannot be opened. The message names it and says why."""


class Rows:
    """The raw samples of one file.

    Args:
        path: a ``.jsonl``, ``.json`` (lines or one array) or ``.parquet`` file.
        cache_dir: where the Arrow copy goes; the default cache of ``datasets`` when absent.

    Raises:
        SourceError: the file is missing, is not a file, or cannot be read at all.
    """

    def __init__(self, path: str | Path, cache_dir: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            problem = "is a folder" if self.path.is_dir() else "no such file"
            raise SourceError(f"{self.path}: {problem}")
        try:
            self._table = _open(self.path, cache_dir)
        except SourceError:
            raise
        except Exception as error:  # whatever the reader raises, the file is named and the run may go on
            raise SourceError(
                f"{self.path}: cannot be read: {type(error).__name__}: {_first_line(error)}"
            ) from error

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> str | Mapping[str, Any]:
        """A raw sample: a line of JSON, or a Parquet row as an object.

        Raises:
            SampleError: the row cannot be read (the disk, or a damaged file).
        """
        try:
            row = self._table[index]
        except Exception as error:
            raise SampleError(
                Reason.UNREADABLE_ROW, f"{type(error).__name__}: {_first_line(error)}"
            ) from error
        return row.get(_LINE, row)


def _open(path: Path, cache_dir: str | None) -> datasets.Dataset:
    stat = path.stat()
    if stat.st_size == 0:
        return datasets.Dataset.from_dict({_LINE: []})
    if path.suffix == ".parquet":
        table = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=cache_dir)
        columns = [name for name in _SAMPLE_COLUMNS if name in table.column_names]
        if not {"messages", "conversations"} & set(columns):
            raise SourceError(f"{path}: no column 'messages'; it has {', '.join(table.column_names)}")
        return table.select_columns(columns)
    try:
        return datasets.Dataset.from_generator(
            _lines,
            features=datasets.Features({_LINE: datasets.Value("large_string")}),
            cache_dir=cache_dir,
            # Size and time are part of the cache's key: a file that changed is read again.
            gen_kwargs={"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns},
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def _lines(path: str, size: int, mtime_ns: int) -> Iterator[dict[str, str]]:
    for _, line in sample_lines(path):
        yield {_LINE: line}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
