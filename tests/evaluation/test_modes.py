"""Modes by name, and quality against speed."""

from __future__ import annotations

import json

import pytest

from vita_audio.cli.evaluate import main
from vita_audio.evaluation.modes import TRADEOFF, mode_fields, modes_for, needs_engine
from vita_audio.evaluation.tradeoff import write_tradeoff


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("boost", ("boost", False, "off")),
        ("1 10", ("turbo", False, "off")),
        ("lossless", ("vanilla", True, "off")),
        ("turbo+audio_rows", ("turbo", False, "auto")),
        ("turbo+audio_rows_on", ("turbo", False, "on")),
    ],
)
def test_a_mode_is_a_schedule_and_what_the_engine_adds(name, fields):
    assert tuple(mode_fields(name).values()) == fields
    assert needs_engine(name) is (fields[1] or fields[2] != "off")


@pytest.mark.parametrize("name", ["boost+speed", "boost+", "lossles", "boost audio_rows"])
def test_unknown_modes_are_named(name):
    with pytest.raises(ValueError, match=name.partition(" ")[0].replace("+", r"\+")):
        mode_fields(name)


def test_a_model_gets_the_modes_that_it_has_heads_for():
    assert modes_for(10, TRADEOFF) == list(TRADEOFF)
    assert modes_for(0, TRADEOFF) == ["vanilla"]
    assert modes_for(1, TRADEOFF) == ["vanilla", "lossless", "1 1"]


@pytest.fixture
def flags(tiny_flags) -> list[str]:
    return tiny_flags("--speed_items", "1")


def test_quality_against_speed_is_one_table_and_one_plot(flags, tmp_path, capsys):
    main([*flags, "--tradeoff"])
    rows = {row["mode"]: row for row in json.loads((tmp_path / "out/results.json").read_text())}
    assert list(rows) == list(TRADEOFF)
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    assert rows["lossless"]["tts_wer"] == rows["vanilla"]["tts_wer"], "lossless says what Vanilla says"
    assert rows["lossless"]["sets"]["tts"]["options"]["lossless"] is True
    assert rows["boost+audio_rows"]["sets"]["tts"]["options"]["audio_rows"] == "auto"
    said = (tmp_path / "out/tradeoff.md").read_text()
    for mode in TRADEOFF:
        assert f"| tiny | {mode} | greedy |" in said
    assert "TTS tts WER %" in said
    assert "speech QA sqa S→S %" in said
    for suffix in ("png", "svg"):
        assert (tmp_path / f"out/tradeoff.{suffix}").stat().st_size > 5000
    assert capsys.readouterr().out.rstrip().endswith("tradeoff.md")


def test_modes_of_the_engine_are_refused_without_it(flags):
    with pytest.raises(ValueError, match="mode lossless: needs the engine"):
        main([*flags, "--modes", "lossless", "--engine", "false"])


def test_a_decoding_without_its_own_speed_has_that_of_its_mode(tmp_path):
    sets = {"a": {"task": "tts", "items": 2, "intervals": {"tts_wer": [0.1, 0.3]}}}
    row = {"stage": "s", "mode": "boost", "sets": sets, "tts_wer": 0.2, "tokens_per_second": 50.0}
    sampled = {key: value for key, value in row.items() if key != "tokens_per_second"}
    said = write_tradeoff(tmp_path, [row, sampled | {"decoding": "published"}]).read_text()
    assert "| s | boost | published | 50 | – | – | 20.0 (10.0 – 30.0) |" in said
    with pytest.raises(ValueError, match="needs a test set with speech"):
        write_tradeoff(tmp_path, [sampled])
