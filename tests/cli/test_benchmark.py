"""The benchmarks under their names, among them those of the original."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.fixture
def main(monkeypatch):
    specification = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return module.main


@pytest.mark.parametrize("name", ["sts", "benchmark_sts"])
def test_every_chunk_of_a_spoken_answer_is_timed(main, tiny_world, codec_flags, capsys, name):
    model = ["--model_name_or_path", str(tiny_world.model_dir), *codec_flags]
    main([name, *model, "--question", tiny_world.audio("question.wav"), "--max-new-tokens", "60"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    codes = tiny_world.codec.encode(tiny_world.audio("answer.wav"))
    assert len(result["chunk_seconds"]) >= len(codes) // 8
    assert result["chunk_seconds"] == sorted(result["chunk_seconds"])


def test_flags_with_dashes_and_unknown_names_reach_the_benchmark(main, refusal):
    said = refusal(main, "benchmark_llm", "--model", "x", "--tokens", "many")
    assert said.startswith("argument --tokens: invalid int value: 'many'")
    assert refusal(main, "speed").startswith("argument name: invalid choice: 'speed'")


def test_streams_in_step_are_compared_with_streams_one_by_one(main, capsys):
    decoder = Path(__file__).parents[1] / "goldens" / "glm4voice" / "decoder"
    sizes = ["--streams", "1", "2", "--codes", "20", "--max_steps", "1"]
    main(["codec-streams", "--flow", str(decoder), "--device", "cpu", "--threads", "1", *sizes])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["1", "2"]
    for ways in result.values():
        for figures in ways.values():
            assert figures["difference"] == 0
            assert figures["work_per_second"] > 0


def test_the_engine_is_measured_beside_the_plain_loop_in_every_mode(main, tmp_path, capsys):
    checkpoint = Path(__file__).parents[1] / "goldens" / "mctp" / "checkpoint"
    files = ["--json", str(tmp_path / "all.json"), "--png", str(tmp_path / "speeds.png")]
    ways = ["--ways", "plain", "engine", "engine_audio_rows", "engine_int8"]
    size = ["--tokens", "24", "--repeats", "1", "--rows", "1", "2", *ways]
    main(["decode", "--model", str(checkpoint), "--dtype", "float32", "--device", "cpu", *size, *files])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    modes = {"vanilla", "balance", "boost", "turbo"}
    assert set(result["plain"]) == modes
    for way in ("engine", "engine_audio_rows", "engine_int8"):
        assert set(result[way]) == modes | {"lossless"}
    for figures in (figures for way in ("plain", "engine") for figures in result[way].values()):
        assert set(figures) == {"tokens_per_second", "first_11_seconds", "share_of_limit"}
        assert all(value > 0 for value in figures.values())
    assert set(result["rows"]) == {"1", "2"}
    assert json.loads((tmp_path / "all.json").read_text())["versions"]["device"].startswith("cpu")
    assert (tmp_path / "speeds.png").stat().st_size > 5000


def test_speed_is_reported_as_the_paper_does(main, tiny_world, codec_flags, tmp_path, capsys, refusal):
    size = ["--dtype", "float32", "--tokens", "60", "--warm_up", "11", "--ways", "plain", "engine"]
    sound = [*codec_flags, "--question", tiny_world.audio("question.wav")]
    main(["paper-speed", "--model", str(tiny_world.model_dir), *size, *sound, "--output_dir", str(tmp_path)])
    found = json.loads((tmp_path / "speed.json").read_text())
    (ways,) = found["models"].values()
    assert list(ways) == ["plain", "engine"]
    for way in ways.values():
        assert set(way["modes"]) >= {"vanilla", "balance", "boost", "turbo"}
        assert way["modes"]["vanilla"]["speed_up"] == 1
        for one in way["modes"].values():
            assert one["seconds"] > one["chunk_seconds"][-1] > one["first_chunk_seconds"] > 0
            assert len(one["chunk_seconds"]) == 4  # after 11, 25, 39 and 53 tokens
        times = way["passes"]
        assert times["head_share"] == pytest.approx(times["head_seconds"] / times["backbone_seconds"])
    assert set(found["streaming"]) == {"vanilla", "balance", "boost", "turbo"}
    assert all(one["chunk_seconds"] for one in found["streaming"].values())
    said = capsys.readouterr().out
    assert "| model | way | mode | seconds | tokens/s | × Vanilla | first chunk ms |" in said
    for name in ("speed.png", "speed.svg", "chunks.png", "chunks.svg", "speed.md"):
        assert (tmp_path / name).stat().st_size > 1000
    nothing = ["--sizes", "0.5b", "--output_dir", str(tmp_path)]
    assert refusal(main, "paper-speed", *nothing, "--tokens", "10").startswith("--tokens 10: give 11 or more")
    assert refusal(main, "paper-speed", *nothing, "--question", "q.wav").startswith(
        "--question needs --model"
    )


def test_a_long_reply_is_followed_alone_and_in_company(main, tiny_world, codec_flags, capsys):
    model = ["--model_name_or_path", str(tiny_world.model_dir), *codec_flags, "--device", "cpu"]
    main(["long-stream", *model, "--seconds", "3", "--talkers", "1", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result) == ["1", "2"]
    for figures in result.values():
        assert set(figures) == {"gap_p50_ms", "gap_p95_ms", "codec_ms_per_s"}
        assert all(len(values) == 1 and values[0] > 0 for values in figures.values())
    with pytest.raises(ValueError, match=r"^the reply ended after \d+ s of speech"):
        main(["long-stream", *model, "--seconds", "600", "--talkers", "1"])


def test_lossless_replies_are_compared_with_vanillas(
    main, tiny_world, codec_flags, capsys, tmp_path, refusal
):
    model = ["--model_name_or_path", str(tiny_world.model_dir), *codec_flags, "--device", "cpu"]
    questions = tmp_path / "typed.jsonl"
    content = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    questions.write_text(json.dumps({"messages": content}) + "\n")
    size = ["--max_new_tokens", "20", "--repeats", "2"]
    main(["lossless", *model, "--questions", str(questions), *size])
    (figures,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert figures["replies"] == figures["equal"] == 1
    assert figures["ratio"] > 0
    assert figures["ratio_after_first_round"] > 0
    main(["lossless", *model, "--questions", str(questions), "--max_new_tokens", "1", "--repeats", "1"])
    (figures,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert figures["ratio_after_first_round"] is None
    none = ["--questions", str(questions), "--repeats", "0"]
    assert refusal(main, "lossless", *model, *none).startswith("--repeats 0: give 1 or more")
    questions.write_text("")
    with pytest.raises(ValueError, match=r"typed\.jsonl: holds no sample"):
        main(["lossless", *model, "--questions", str(questions), *size])


def test_the_benchmark_of_the_engine_asks_for_a_model(main, refusal):
    assert refusal(main, "decode").startswith("give --model or --sizes")


@pytest.mark.parametrize("name", ["decode", "generate"])
def test_a_model_that_is_not_there_is_named(main, name):
    with pytest.raises(ValueError, match=r"^nowhere\.json: no such file or folder; give a config\.json or"):
        main([name, "--model", "nowhere.json"])
