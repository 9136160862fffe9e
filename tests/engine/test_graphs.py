"""What is recorded, what is replayed, and when recordings are dropped, with a stand-in for CUDA's graphs."""

from contextlib import contextmanager

import pytest
import torch

from vita_audio.engine.graphs import MOST_GRAPHS, SWITCH, Graphs


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What happened: functions that ran add to it themselves."""
    happened: list[str] = []

    class Graph:
        def replay(self):
            happened.append("replay")

    @contextmanager
    def record(graph, pool):
        happened.append("record")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return happened


def test_a_function_runs_first_is_recorded_then_and_replayed_from_then_on(log):
    graphs = Graphs(torch.device("cuda"))
    for _ in range(3):
        graphs.run("round", lambda: log.append("run"))
    assert log == ["run", "record", "run", "replay", "replay"]


def test_what_has_no_key_and_what_the_switch_forbids_is_never_recorded(log, monkeypatch):
    graphs = Graphs(torch.device("cuda"))
    for _ in range(3):
        graphs.run(None, lambda: log.append("run"))
    monkeypatch.setenv(SWITCH, "0")
    switched_off = Graphs(torch.device("cuda"))
    for _ in range(3):
        switched_off.run("round", lambda: log.append("run"))
    assert log == ["run"] * 6


def test_the_recording_that_was_used_least_recently_is_dropped(log):
    graphs = Graphs(torch.device("cuda"))
    for _ in range(2):
        graphs.run("kept", lambda: log.append("run"))
        graphs.run("dropped", lambda: log.append("run"))
    for number in range(MOST_GRAPHS - 1):
        graphs.run("kept", lambda: log.append("run"))
        graphs.run(number, lambda: log.append("run"))
    log.clear()
    graphs.run("kept", lambda: log.append("run"))
    graphs.run("dropped", lambda: log.append("run"))
    assert log == ["replay", "run"]
