"""Preparation in several processes, killed and started again, gives the same bytes as in one go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from vita_audio.chat import read_samples
from vita_audio.corpora import Settings, prepare, read_recipes

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = read_recipes()["MushanW/GLOBE_V2"]
OUTPUT = RECIPE.parts[0].output
SHARDS, ROWS = 6, 5

# The command itself, with a note of every item that a process reads.
NOTED = """
import os, runpy, sys
from vita_audio.corpora.samples import Builder

build, notes = Builder.build, os.path.join(sys.argv[1], os.environ["RANK"])

def noting(self, item):
    with open(notes, "a") as file:
        print(item.id, file=file)
    return build(self, item)

Builder.build = noting
sys.argv = ["prepare_data.py", *sys.argv[2:]]
runpy.run_path("tools/prepare_data.py", run_name="__main__")
"""

# The command itself, killed without warning in the middle of a unit.
KILLED = """
import os, runpy, signal, sys
from vita_audio.corpora.samples import Builder

build, left = Builder.build, [int(sys.argv[1])]

def counting(self, item):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return build(self, item)

Builder.build = counting
sys.argv = ["prepare_data.py", *sys.argv[2:]]
runpy.run_path("tools/prepare_data.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory, sound) -> Path:
    """Six Parquet files of five clips, one of them damaged, one Parquet file cut off."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "data").mkdir()
    for shard in range(SHARDS):
        rows = [
            {
                "audio": {
                    "bytes": sound(10 * shard + row, "flac")[: 900 if row == 3 else None],
                    "path": f"{row}.flac",
                },
                "transcript": f"this is the sentence {row} of the file {shard}",
                "speaker_id": f"S{row}",
            }
            for row in range(ROWS)
        ]
        path = folder / f"data/train-{shard:05d}-of-00006.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def content(root: Path) -> dict[str, bytes]:
    """Every file below a data root."""
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of a preparation that was not interrupted, in one process."""
    root = tmp_path_factory.mktemp("whole")
    [tally] = prepare(RECIPE, source, root, Settings()).values()
    assert (tally.samples, dict(tally.rejected)) == (20, {"audio_truncated": 5, "damaged_file": 1})
    files = content(root)
    assert sorted(Path(name).name for name in files) == [
        *(f"{shard:05d}-train-{shard:05d}-of-00006.tar" for shard in range(SHARDS - 1)),
        "train.jsonl",
        "train.rejected.jsonl",
        "train.report.json",
    ]
    return files


def run(*command: object, scratch: Path) -> subprocess.CompletedProcess:
    scratch.mkdir(exist_ok=True)
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=540, check=False,
    )  # fmt: skip


def test_a_killed_preparation_goes_on_to_the_same_bytes(source, whole, tmp_path):
    root = tmp_path / "root"
    flags = ("globe_v2", source, "--root", root)
    killed = run("-c", KILLED, 2 * ROWS + 3, *flags, scratch=tmp_path / "scratch")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (root / OUTPUT).exists(), "no half file under the final name"
    done = sorted(path.name for path in root.rglob("*.prepare/*/*.json"))
    assert len(done) == 2
    rest = 3 * ROWS  # of the three units that were not done, and can be read
    finished = run("-c", KILLED, rest, *flags, scratch=tmp_path / "scratch")
    assert finished.returncode == 0, "units that were done are not read again"
    assert content(root) == whole


def test_workers_of_one_machine_give_the_same_bytes(source, whole, tmp_path):
    prepare(RECIPE, source, tmp_path, Settings(num_workers=2))
    assert content(tmp_path) == whole


def test_two_nodes_with_their_own_scratch_give_the_same_bytes(source, whole, tmp_path):
    """Two processes of a launch share only the data root, and the work."""
    (tmp_path / "noted.py").write_text(NOTED)
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "noted.py")
    flags = (tmp_path, "globe_v2", source, "--root", tmp_path / "root")
    result = run(*command, *flags, scratch=tmp_path / "scratch")
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "root") == whole
    read = [(tmp_path / rank).read_text().split() for rank in ("0", "1")]
    assert [len(items) for items in read] == [3 * ROWS, 2 * ROWS], "every item is read by one of them"
    assert not set(read[0]) & set(read[1])
    ids = [sample.id for _, sample in read_samples(tmp_path / "root" / OUTPUT, tmp_path / "root")]
    assert len(ids) == len(set(ids)) == 20


def test_single_files_instead_of_archives_hold_the_same_clips(source, tmp_path):
    prepare(RECIPE, source, tmp_path, Settings(clips="files"))
    samples = [sample for _, sample in read_samples(tmp_path / OUTPUT, tmp_path)]
    files = {Path(audio) for sample in samples for audio in sample.audios}
    assert len(files) == 20
    assert all(path.is_file() and path.suffix == ".flac" for path in files)


def test_a_refusal_of_the_first_process_ends_all(tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "tools/prepare_data.py")
    (tmp_path / "source").mkdir()
    result = run(*command, "aishell", tmp_path / "source", "--root", tmp_path, scratch=tmp_path / "scratch")
    assert result.returncode != 0
    assert "holds nothing of shenyunhang" in result.stderr


def test_more_or_changed_files_are_prepared_again(source, tmp_path):
    copy = tmp_path / "source"
    (copy / "data").mkdir(parents=True)
    names = sorted(path.name for path in (source / "data").iterdir())
    for name in names[:2]:
        (copy / "data" / name).write_bytes((source / "data" / name).read_bytes())
    [tally] = prepare(RECIPE, copy, tmp_path / "root", Settings()).values()
    assert tally.samples == 8
    (copy / "data" / names[2]).write_bytes((source / "data" / names[2]).read_bytes())
    [tally] = prepare(RECIPE, copy, tmp_path / "root", Settings()).values()
    assert tally.samples == 12
    report = json.loads((tmp_path / "root" / OUTPUT.replace(".jsonl", ".report.json")).read_text())
    assert (report["units"], report["samples"], report["hours"]) == (
        3,
        12,
        pytest.approx(12 * 1.5 / 3600, abs=1e-4),
    )
