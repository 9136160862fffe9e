"""A mix's temperature replaces ratios: large sets shrink, small ones grow, the epoch keeps its size."""

import logging

import pytest

from vita_audio.data.mixing import Mix, MixError, read_mix
from vita_audio.data.temperature import tempered_ratios


def test_temperature_one_keeps_sizes_and_a_high_one_levels_them():
    rows = {"large": 900, "small": 100, "empty": 0}
    assert tempered_ratios(rows, 1) == {"large": 1, "small": 1, "empty": 0}
    ratios = tempered_ratios(rows, 2)
    assert ratios["large"] * 900 == pytest.approx(750)  # √900 : √100 = 3 : 1
    assert ratios["small"] * 100 == pytest.approx(250)
    ratios = tempered_ratios(rows, 1e9)
    assert ratios["large"] * 900 == pytest.approx(500)
    assert ratios["small"] * 100 == pytest.approx(500)


@pytest.fixture
def open_mix(tmp_path, write_lines, text_sample, arrow_cache):
    for name, count in (("a", 60), ("b", 30), ("c", 10)):
        write_lines(tmp_path / f"{name}.jsonl", [text_sample(f"{name} {row}") for row in range(count)])

    def open_mix(*lines: str) -> Mix:
        write_lines(tmp_path / "mix.yaml", [*lines])
        return Mix(read_mix(tmp_path / "mix.yaml"), 0, cache_dir=arrow_cache)

    return open_mix


def test_the_files_of_a_set_share_its_ratio_and_num_still_caps(open_mix):
    mix = open_mix(
        "temperature: 2", "dataset: {large: {data_paths: [a.jsonl, b.jsonl]}, small: {data_paths: c.jsonl}}"
    )
    assert mix.used == [50, 25, 25]
    mix = open_mix(
        "temperature: 2", "dataset: {large: {num: 40, data_paths: [a.jsonl]}, small: {data_paths: c.jsonl}}"
    )
    assert mix.used == [40, 20]


def test_ratio_zero_excludes_a_set_and_a_missing_file_weighs_nothing(open_mix, caplog):
    caplog.set_level(logging.WARNING)
    mix = open_mix(
        "temperature: 1.0",
        "dataset:",
        "  out: {ratio: 0, data_paths: a.jsonl}",
        "  in: {data_paths: [b.jsonl, lost.jsonl]}",
        "  c: {data_paths: c.jsonl}",
    )
    assert mix.used == [30, 10]
    assert "lost.jsonl: no such file" in caplog.text


def test_a_temperature_with_ratios_or_below_one_is_refused(open_mix):
    with pytest.raises(MixError, match="'a': the mix has a temperature, which replaces 'ratio'; remove one"):
        open_mix("temperature: 2", "dataset: {a: {ratio: 0.5, data_paths: a.jsonl}}")
    for wrong in ("0.5", "hot", "true", "-1"):
        with pytest.raises(MixError, match="'temperature' must be a number of 1 or more"):
            open_mix(f"temperature: {wrong}", "dataset: {a: {data_paths: a.jsonl}}")
