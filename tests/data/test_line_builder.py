"""Lines go into Arrow in few blocks, in order, and the module that reads data files stays as it is."""

from __future__ import annotations

import pathlib

import pyarrow

from vita_audio.data import sources
from vita_audio.data.sources import Rows


def blocks_of(folder: pathlib.Path) -> list[int]:
    """Rows of each block of the only Arrow file in a cache."""
    [file] = folder.rglob("*.arrow")
    with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
        return [batch.num_rows for batch in reader]


def test_lines_keep_their_order_over_blocks(tmp_path):
    lines = [f'{{"number": {number}}}' for number in range(45_000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = Rows(tmp_path / "a.jsonl", str(tmp_path / "arrow"))
    assert [rows[index] for index in (0, 19_999, 20_000, 44_999)] == [
        lines[0],
        lines[19_999],
        lines[20_000],
        lines[-1],
    ]
    assert blocks_of(tmp_path / "arrow") == [20_000, 20_000, 5_000]


def test_long_lines_make_smaller_blocks(tmp_path):
    line = '{"text": "' + "x" * 1_500_000 + '"}'
    (tmp_path / "a.jsonl").write_text("\n".join([line] * 7))
    assert len(Rows(tmp_path / "a.jsonl", str(tmp_path / "arrow"))) == 7
    assert blocks_of(tmp_path / "arrow") == [3, 3, 1]


def test_datasets_changes_no_names_of_the_module_that_reads_data_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    Rows(tmp_path / "a.jsonl", str(tmp_path / "arrow"))
    assert sources.Path is pathlib.Path
    assert sources.os.path.exists is __import__("os").path.exists
