"""Data files as random-access rows of raw samples, memory-mapped through ``datasets``.

JSON lines are kept as lines and parsed one by one when needed, so a broken line, or a column
that changes its type, costs one sample and not the whole file. The first use of a file converts it into an
Arrow file in the cache of ``datasets`` (HF_DATASETS_CACHE); later runs, other ranks and the workers map
that file. A read-only cache can be used if it holds the Arrow files already. Parquet files keep their columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.io.parquet import ParquetDatasetReader

from vita_audio.chat import Reason, SampleError, SampleFileError, sample_lines
from vita_audio.data.faults import NOT_WRITABLE, MachineError, first_line, machine_fault
from vita_audio.data.line_builder import LINE, LineBuilder

_SAMPLE_COLUMNS = ("messages", "conversations", "audios")


class SourceError(ValueError):
    """A data file that exists but cannot be used. The message names the file and the reason."""


class MissingSource(SourceError):
    """A data file that is missing or empty."""


class Rows:
    """The raw samples of one file.

    Args:
        path: a ``.jsonl`` or ``.json`` file (lines or one array, plain or compressed), or a ``.parquet`` file.
        cache_dir: folder of the Arrow copy; defaults to the cache of ``datasets``.

    Raises:
        MissingSource: there is no such file, or it is a folder.
        SourceError: the file is damaged or its format is not supported.
        MachineError: the disk or the Arrow cache failed.
    """

    def __init__(self, path: str | Path, cache_dir: str | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "is no regular file"
            raise MissingSource(f"{self.path}: {what if self.path.exists() else 'no such file'}")
        try:
            self._table = _open(self.path, cache_dir)
        except (SourceError, MachineError):
            raise
        except Exception as error:  # any error of a reader: name the file and the side at fault
            raise _explain(self.path, cache_dir, error) from error

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> str | Mapping[str, Any]:
        """A raw sample: a line of JSON, or a Parquet row as an object.

        Raises:
            SampleError: the row cannot be read.
        """
        try:
            row: Mapping[str, Any] = self._table[index]
        except Exception as error:
            raise SampleError(Reason.UNREADABLE_ROW, first_line(error)) from error
        line = row.get(LINE)
        return line if isinstance(line, str) else row


def map_parquet(
    paths: Sequence[str | Path],
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """Parquet files with the same columns, as one memory-mapped table.

    ``datasets`` treats paths as patterns and would read ``data1`` for ``data[1]``; resolved files are
    taken literally. Size and time are part of its cache key, so a changed file is read again.

    Raises:
        SourceError: a path contains ``::``, which the reader's file layer splits.
    """
    absolute = [os.path.abspath(path) for path in paths]
    for path in absolute:
        if "::" in path:
            raise SourceError(f"{path}: Parquet files are not read from paths with '::'; rename it")
    stats = [os.stat(path) for path in absolute]
    versions = [
        (path, f"{stat.st_size} {stat.st_mtime_ns}") for path, stat in zip(absolute, stats, strict=True)
    ]
    files = DataFilesDict({"train": DataFilesList(absolute, versions)})
    return _cached_table(lambda cache: ParquetDatasetReader(files, cache_dir=cache).builder, cache_dir)


def _open(path: Path, cache_dir: str | None) -> datasets.Dataset:
    try:
        path.open("rb").close()
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error
    stat = path.stat()
    if stat.st_size == 0:
        return datasets.Dataset.from_dict({LINE: []})
    if path.suffix.lower() == ".parquet":
        table = map_parquet([path], cache_dir)
        columns = [name for name in _SAMPLE_COLUMNS if name in table.column_names]
        if not {"messages", "conversations"} & set(columns):
            raise SourceError(f"{path}: no column 'messages'; it has {', '.join(table.column_names)}")
        return table.select_columns(columns)
    key = {"path": str(path.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        return _cached_table(lambda cache: LineBuilder(cache_dir=cache, **key), cache_dir)
    except ValueError:
        if next(sample_lines(path), None) is None:  # datasets makes no table of no rows
            return datasets.Dataset.from_dict({LINE: []})
        raise


def _cached_table(open_builder: Callable[[str | None], Any], cache_dir: str | None) -> datasets.Dataset:
    """The table of a builder of ``datasets``, from the Arrow cache; written there first if the cache lacks it.

    Builders lock the cache even for reading, which fails if it is read-only. Its Arrow files are then opened
    directly, in the folder where the builder would have written them.

    Args:
        open_builder: opens it with a cache folder.
    """
    try:
        builder = open_builder(cache_dir)
        builder.download_and_prepare()
        table = builder.as_dataset(split=datasets.Split.TRAIN)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        with TemporaryDirectory() as scratch:
            place = Path(open_builder(scratch).cache_dir).relative_to(scratch)
        cached = Path(cache_dir or datasets.config.HF_DATASETS_CACHE, place)
        if not (cached / datasets.config.DATASET_INFO_FILENAME).is_file():
            raise
        files = sorted(cached.glob("*.arrow"))
        table = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
    assert isinstance(table, datasets.Dataset)
    return table


def _explain(path: Path, cache_dir: str | None, error: Exception) -> Exception:
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(
        error.__cause__, Exception
    ):
        error = error.__cause__
    if isinstance(error, SampleFileError):
        return SourceError(str(error))
    fault = machine_fault(error)
    if fault is None and isinstance(error, OSError) and error.errno is not None:
        fault = (
            f"{error.filename}: {error.strerror}"  # the file itself was opened, so the error is in the cache
        )
    if fault is None:
        return SourceError(f"{path}: cannot be read: {first_line(error)}")
    cache = cache_dir or datasets.config.HF_DATASETS_CACHE
    return MachineError(
        f"{path}: cannot be opened because this machine failed: {fault}; its Arrow copy goes to {cache}: "
        "free some space there, or set HF_DATASETS_CACHE to a writable folder"
    )
