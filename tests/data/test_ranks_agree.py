"""Ranks with different data do not train together: real processes over gloo, with files of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vita_audio.data.checks import DataIdentity, check_ranks_agree
from vita_audio.data.mixing import FileState
from vita_audio.data.token_cache import CachedClip, CodecIdentity, write_identity, write_shard

REPOSITORY = Path(__file__).resolve().parents[2]

RANK = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from vita_audio.data import CodecSpec, DataConfig, build_train_loader
from vita_audio.distributed import rank, world_size

def main(tokenizer, folder, token_cache):
    loader = build_train_loader(
        DataConfig(f"{folder}/mix.yaml", seq_length=128, num_workers=0, arrow_cache=f"{folder}/arrow",
                   token_cache=token_cache or None),
        AutoTokenizer.from_pretrained(tokenizer), CodecSpec("mel_vq"),
        rank=rank(), world_size=world_size(), output_dir=folder)
    try:
        print(json.dumps({"rows": next(iter(loader))["input_ids"].shape[0]}))
    except ValueError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture
def nodes(tmp_path, text_sample, write_lines):
    """Two folders that represent two machines, with the same data."""
    for rank in range(2):
        folder = tmp_path / f"node{rank}"
        for name in "ab":
            write_lines(folder / f"{name}.jsonl", [text_sample(f"{name}{index}") for index in range(40)])
        write_lines(folder / "mix.yaml", ["dataset: {s: {data_paths: [a.jsonl, b.jsonl]}}"])
    return tmp_path


@pytest.fixture
def outcomes(nodes, goldens):
    def outcomes(token_cache: str = "") -> list[dict]:
        script = nodes / "rank.py"
        script.write_text(RANK)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            folder = nodes / f"node{rank}"
            place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            environment |= {name: str(value) for name, value in place.items()}
            cache = str(folder / token_cache) if token_cache else ""
            command = [sys.executable, script, goldens.folder / "tokenizer" / "glm4voice", folder, cache]
            processes.append(
                subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.PIPE, text=True)
            )
        return [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in processes]

    return outcomes


def test_a_file_that_one_rank_lacks_stops_all_ranks_before_the_first_row(nodes, outcomes):
    (nodes / "node1" / "b.jsonl").unlink()
    first, second = outcomes()
    assert first == second
    assert first["error"].startswith("MixError: the ranks do not have the same data: rank 1 (")
    assert f"lacks {nodes / 'node1' / 'b.jsonl'} of s/b, which rank 0 (" in first["error"]
    assert "\n" not in first["error"]


def test_token_caches_that_differ_stop_all_ranks_and_equal_ones_train(nodes, outcomes):
    identity = CodecIdentity("mel_vq", "one", 8)
    for rank in range(2):
        folder = nodes / f"node{rank}" / "tokens" / identity.folder_name
        write_identity(folder, identity)
        write_shard(folder, "x", [CachedClip("a.wav", "0", 1, 1.0, [1])])
    assert outcomes("tokens") == [{"rows": 1}, {"rows": 1}]
    write_shard(folder, "y", [CachedClip("b.wav", "0", 1, 1.0, [2])])
    first, second = outcomes("tokens")
    assert first == second
    assert "token cache is mel_vq-one of 2 clips" in first["error"]
    assert "on rank 1" in first["error"]


def identity(*files: FileState, **settings: str) -> DataIdentity:
    return DataIdentity("host", files, {"seed": "1", **settings})


GOOD = FileState("s/a", "/x/a.jsonl", rows=10, bytes=100, used=10)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (identity(FileState("s/a", "/y/a.jsonl")), r"rank 1 \(host\) lacks /y/a\.jsonl of s/a, which rank 0"),
        (
            identity(FileState("s/a", "/y/a.jsonl", 9, 90, 9)),
            r"/y/a\.jsonl has 9 samples in 90 bytes on rank 1",
        ),
        (identity(FileState("s/a", "/y/a.jsonl", 10, 99, 10)), r"has 10 samples in 99 bytes on rank 1"),
        (identity(FileState("s/a", "/y/a.jsonl", 10, 100, 5)), r"rank 1 takes 5 samples of s/a, rank 0 10"),
        (
            identity(GOOD, GOOD),
            r"the mix file is not the same \(rank 0 names 1 files, rank 1 names 2 files\)",
        ),
        (
            identity(FileState("s/a", "/y/a.jsonl", 10, 100, 10, "other")),
            r"/y/a\.jsonl has another content on rank 1 \(host\) than on rank 0",
        ),
        (identity(GOOD, codec="mel_vq one"), r"codec is mel_vq one on rank 1 \(host\) and None on rank 0"),
        (identity(GOOD, seed="2"), r"seed is 2 on rank 1 \(host\) and 1 on rank 0"),
    ],
)
def test_every_difference_is_named(monkeypatch, other, message):
    mine = identity(GOOD)
    monkeypatch.setattr("vita_audio.data.checks.gather_objects", lambda _: [mine, other])
    with pytest.raises(ValueError, match=f"^the ranks do not have the same data: .*{message}"):
        check_ranks_agree(mine)


def test_the_same_data_in_another_folder_is_the_same(monkeypatch):
    mine, other = (
        identity(GOOD),
        identity(FileState("s/a", "/elsewhere/a.jsonl", rows=10, bytes=100, used=10)),
    )
    monkeypatch.setattr("vita_audio.data.checks.gather_objects", lambda _: [mine, other])
    check_ranks_agree(mine)
