"""Clips in the rows of Parquet files are read like files, in bounded memory, and their faults are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from vita_audio.audio import AudioError, load_audio
from vita_audio.audio.archives import file_exists, file_size, read_file, stored_size
from vita_audio.audio.io import audio_duration

CLIPS = 50


@pytest.fixture
def clips(tmp_path) -> list[bytes]:
    path, found = tmp_path / "clip.flac", []
    for number in range(CLIPS):
        soundfile.write(path, 0.2 * np.sin(np.arange(160 * (number + 10)) / 7), 16_000)
        found.append(path.read_bytes())
    return found


def write(path: Path, clips: list, rows: int = 20, **options) -> Path:
    table = pyarrow.Table.from_pylist([{"text": "x", "audio": clip} for clip in clips])
    pyarrow.parquet.write_table(table, path, row_group_size=rows, **options)
    return path


def struct(clip: bytes | None) -> dict:
    return {"bytes": clip, "path": "a.flac"}


@pytest.mark.parametrize("form", [struct, bytes])
def test_a_row_equals_the_file_that_went_in_whatever_the_order(tmp_path, clips, form):
    file = write(tmp_path / "clips.parquet", [form(clip) for clip in clips])
    for row in (*range(CLIPS), 49, 0, 21, 20, 19, 40, 3):
        assert read_file(f"{file}/audio/{row}") == clips[row]
    assert audio_duration(f"{file}/audio/7") == 0.17
    assert load_audio(f"{file}/audio/7")[1] == 16_000
    assert file_size(f"{file}/audio/7") == len(clips[7])
    assert stored_size(f"{file}/audio/7") == file.stat().st_size


def test_what_is_not_there_is_named_in_one_line(tmp_path, clips):
    file = write(tmp_path / "clips.parquet", [struct(clip) for clip in clips[:3]] + [struct(None)])
    for member, message in {
        "audio/4": "has no row 4, it has 4",
        "audio/-1": "has no member audio/-1; a row is COLUMN/ROW",
        "audio": "has no member audio; a row is COLUMN/ROW",
        "sound/1": "has no column sound, it has text, audio",
        "audio/3": "row 3 of .*/audio is empty",
    }.items():
        with pytest.raises(AudioError, match=rf"^[^\n]*{message}[^\n]*$") as error:
            load_audio(f"{file}/{member}")
        assert error.value.reason == "missing"
        assert not file_exists(f"{file}/{member}") or member == "audio/3", "a look costs no read of the row"
    with pytest.raises(
        AudioError, match=r"the column text of \S+clips\.parquet holds string, not audio$"
    ) as error:
        load_audio(f"{file}/text/0")
    assert error.value.reason == "unreadable"
    assert not file_exists(f"{tmp_path}/lost.parquet/audio/0")


def test_a_damaged_page_costs_its_rows_and_no_others(tmp_path, clips):
    file = write(tmp_path / "clips.parquet", [struct(clip) for clip in clips], compression="snappy")
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(1)
    assert column.path_in_schema == "audio.bytes"
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[start : start + 60] = bytes(60)
    file.write_bytes(content)
    for row in (*range(CLIPS), 5):
        if 20 <= row < 40:
            with pytest.raises(OSError, match=rf"^[^\n]*row {row} of {file} is damaged: [^\n]*$"):
                read_file(f"{file}/audio/{row}")
        else:
            assert read_file(f"{file}/audio/{row}") == clips[row]


@pytest.mark.parametrize("damage", [b"PAR1", b"", b"no parquet" * 100])
def test_a_file_that_is_no_parquet_is_named_in_one_line(tmp_path, damage):
    (tmp_path / "clips.parquet").write_bytes(damage)
    with pytest.raises(AudioError, match=r"^[^\n]*clips\.parquet[^\n]*damaged[^\n]*$") as error:
        load_audio(f"{tmp_path}/clips.parquet/audio/0")
    assert error.value.reason == "unreadable"


def test_a_changed_file_is_read_again(tmp_path, clips):
    file = write(tmp_path / "clips.parquet", [struct(clip) for clip in clips])
    assert read_file(f"{file}/audio/5") == clips[5]
    write(file, [struct(clip) for clip in clips[1:]])
    assert read_file(f"{file}/audio/5") == clips[6]


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    """One row group of 200 MB, in pages of some rows."""
    noise = np.random.default_rng(0).bytes(1_000_000)
    clips = [struct(bytes([number]) + noise) for number in range(200)]
    file = write(tmp_path / "clips.parquet", clips, rows=200, compression="none", use_dictionary=False, write_batch_size=8)
    pool, most = pyarrow.default_memory_pool(), 0
    before = pool.bytes_allocated()
    for number in range(0, 200, 5):
        assert read_file(f"{file}/audio/{number}")[0] == number
        most = max(most, pool.bytes_allocated() - before)
    assert 0 < most < 100_000_000
