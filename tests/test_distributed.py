"""A process knows its place in the launch, and exchanges values with the others."""

import json
import subprocess
import sys

import pytest

from vita_audio import distributed

EXCHANGE = """
import json, sys
from pathlib import Path
from vita_audio import distributed
seen = distributed.gather_objects({"rank": distributed.rank(), "local": distributed.local_rank()})
distributed.barrier()
Path(sys.argv[1], str(distributed.rank())).write_text(json.dumps([seen, distributed.is_first()]))
"""

DEAL = """
import json, sys, time
from pathlib import Path
from vita_audio import distributed
mine = []
for name in ("first", "second"):
    for number in distributed.shared_numbers(name):
        if number >= 20:
            break
        mine.append([name, number])
        time.sleep(0.02 * (1 + 4 * distributed.rank()))
Path(sys.argv[1], str(distributed.rank())).write_text(json.dumps(mine))
"""


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_a_process_started_alone_is_the_first_of_one():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert (distributed.local_rank(), distributed.local_world_size()) == (0, 1)
    assert distributed.is_first()
    assert distributed.gather_objects("mine") == ["mine"]
    distributed.barrier()


def test_the_rank_comes_from_the_launcher(monkeypatch):
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert (distributed.rank(), distributed.world_size()) == (9, 16)
    assert (distributed.local_rank(), distributed.local_world_size()) == (1, 8)
    assert not distributed.is_first()


def test_every_process_gets_the_values_of_all_in_rank_order(tmp_path):
    (tmp_path / "exchange.py").write_text(EXCHANGE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*launch, tmp_path / "exchange.py", tmp_path], check=True, capture_output=True, timeout=120
    )
    everything = [{"rank": 0, "local": 0}, {"rank": 1, "local": 1}]
    assert json.loads((tmp_path / "0").read_text()) == [everything, True]
    assert json.loads((tmp_path / "1").read_text()) == [everything, False]


def test_each_number_is_dealt_to_one_process_and_the_faster_one_gets_more(tmp_path):
    (tmp_path / "deal.py").write_text(DEAL)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, tmp_path / "deal.py", tmp_path], check=True, capture_output=True, timeout=120)
    shares = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)]
    dealt = sorted(map(tuple, shares[0] + shares[1]))
    assert dealt == [(name, number) for name in ("first", "second") for number in range(20)]
    assert all(shares)


@pytest.mark.usefixtures("alone")
def test_one_process_is_dealt_all_numbers():
    numbers = distributed.shared_numbers("any")
    assert [next(numbers) for _ in range(3)] == [0, 1, 2]
