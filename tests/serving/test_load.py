"""The benchmarks of the server at a tiny size: latency under load, a crowd for some seconds, interruptions."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def at(running, tiny_world) -> list[str]:
    return ["--url", running.address, "--questions", str(tiny_world.data_dir / "sqa.jsonl")]


def test_latency_is_measured_and_drawn(benchmark, at, capsys, tmp_path):
    files = ["--output", str(tmp_path / "all.json"), "--png", str(tmp_path / "all.png")]
    benchmark("serve").main([*at, "--talkers", "2", "4", "--turns", "4", *files])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "all.json").read_text())
    for row in record["talkers"].values():
        assert row["complete"] == 1
        assert 0 < row["first_sound_ms"]["p50"] <= row["first_sound_ms"]["p99"]
        assert row["server_memory_mb"] > 100
    assert record["versions"]["torch"]
    assert (tmp_path / "all.png").read_bytes()[1:4] == b"PNG"


def test_a_crowd_leaves_nothing_behind(benchmark, at, capsys, running, tmp_path):
    """Some leave early or send nonsense; twenty minutes of this are in docs/log.md."""
    size = ["--seconds", "6", "--warm_up", "2", "--pause", "0.05", "--most_growth_mb", "500"]
    benchmark("soak").main([*at, *size, "--png", str(tmp_path / "soak.png")])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"realtime", "speech", "chat", "transcription", "malformed", "left early"} <= set(record["visits"])
    assert record["failures"] == 0
    assert record["slots_and_connections_left"] == 0
    running.assert_nothing_is_left()
    assert (tmp_path / "soak.png").stat().st_size


def test_a_crowd_that_is_not_served_is_a_failure(benchmark, at, running, monkeypatch):
    def broken(request):
        raise RuntimeError("broken")
        yield

    monkeypatch.setattr(running.service.pipeline.backend, "stream", broken)
    with pytest.raises(ValueError, match="did not stand it: failures"):
        benchmark("soak").main([*at, "--seconds", "1", "--warm_up", "1"])


def test_replies_after_interruptions_are_compared_with_fresh_ones(
    benchmark, tiny_world, codec_flags, capsys, loud_is_speech
):
    model = ["--model_name_or_path", str(tiny_world.model_dir), *codec_flags]
    benchmark("barge_in").main(
        [*model, "--questions", str(tiny_world.data_dir / "sqa.jsonl"), "--times", "2"]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["equal"] == record["replies"] >= 2
    assert record["late_pieces"] == 0
    assert record["stopped_after_ms"]["max"] > 0
