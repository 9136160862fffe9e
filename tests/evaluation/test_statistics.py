"""Intervals cover the truth as often as they say, and equal models rarely differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vita_audio.cli.compare_results import compare, main
from vita_audio.evaluation.statistics import (
    difference,
    holm,
    interval,
    intervals,
    mcnemar,
    rate,
    rates,
)
from vita_audio.evaluation.tasks.task import Column

UTTERANCES = 120


def word_errors(generator: np.random.Generator, true_rate: float, count: int = UTTERANCES) -> list:
    """Errors of utterances of different lengths and difficulties."""
    words = generator.integers(4, 30, count)
    errors = generator.poisson(words * true_rate * generator.gamma(1.0, 1.0, count))
    return list(zip(map(float, errors), map(float, words), strict=True))


def answers(generator: np.random.Generator, share: float | np.ndarray, count: int = UTTERANCES) -> list:
    return [(float(right), 1.0) for right in generator.random(count) < share]


def mean_rates(generator: np.random.Generator, mean: float, count: int = UTTERANCES) -> list:
    """Rates of utterances, most of them without an error."""
    return [(float(value), 1.0) for value in generator.gamma(0.5, 2 * mean, count)]


@pytest.mark.parametrize(("make", "truth"), [(word_errors, 0.08), (answers, 0.75), (mean_rates, 0.05)])
def test_intervals_cover_the_truth_in_95_of_100_evaluations(make, truth):
    generator = np.random.default_rng(3)
    tries = 500
    covered = 0
    for _ in range(tries):
        low, high = interval(make(generator, truth))
        covered += low <= truth <= high
    assert 0.93 <= covered / tries <= 0.97


def test_equal_models_are_said_to_differ_in_at_most_5_of_100_comparisons():
    """Each comparison has a speech-QA set and a recognition set, as two evaluations have."""
    generator = np.random.default_rng(5)
    reported = 0
    for _ in range(200):
        ease = generator.beta(2, 1, UTTERANCES)
        words, difficulty = generator.integers(4, 30, UTTERANCES), generator.gamma(1.0, 1.0, UTTERANCES)
        chances = [difference(answers(generator, ease), answers(generator, ease))[2]]
        errors = [generator.poisson(words * 0.08 * difficulty) for _ in range(2)]
        chances.append(difference(*(list(zip(one, words, strict=True)) for one in errors))[2])
        reported += min(holm(chances)) < 0.05
    assert reported <= 10


def test_a_real_difference_is_found():
    generator = np.random.default_rng(1)
    worse = word_errors(generator, 0.10)
    better = [(above * 0.7, below) for above, below in worse]
    value, (low, high), chance = difference(worse, better)
    assert value == pytest.approx(-0.3 * rate(worse))
    assert low < value < high < 0
    assert chance < 0.001


def test_pairs_make_a_comparison_sharper_than_two_intervals():
    generator = np.random.default_rng(2)
    difficulty = generator.gamma(1.0, 4.0, 200)
    words = np.full(200, 20.0)
    first = list(zip(difficulty, words, strict=True))
    second = list(zip(0.9 * difficulty + 0.01 * generator.random(200), words, strict=True))
    _, (low, high), chance = difference(first, second)
    assert chance < 0.001
    assert interval(first)[0] < rate(second), "the intervals of the two overlap"
    assert high - low < 0.5 * (interval(first)[1] - interval(first)[0])


def test_mcnemar_is_the_exact_test():
    only_first, only_second = [True] * 9 + [False] * 11, [False] * 18 + [True] * 2
    assert mcnemar(np.array(only_first), np.array(only_second)) == pytest.approx(0.0654, abs=1e-4)
    assert mcnemar(np.array([False]), np.array([False])) == 1.0


def test_holm_multiplies_by_the_number_of_comparisons_left():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_sets_without_an_error_have_an_upper_limit():
    assert interval([(0.0, 10.0)] * 30) == (0.0, 0.01)
    low, high = interval([(1.0, 1.0)] * 40)
    assert high == pytest.approx(1.0)
    assert 0.9 < low < 0.92


def test_what_has_no_interval_has_none():
    assert interval([(1.0, 2.0)]) is None
    assert interval([(1.0, 0.0), (1.0, 0.0)]) is None
    assert intervals([{"a": (1.0, 2.0)}]) == {}
    assert rates([{"a": (1.0, 2.0)}, {"a": (1.0, 2.0), "b": (1.0, 0.0)}]) == {"a": 0.5, "b": None}
    with pytest.raises(ValueError, match="a comparison needs the same"):
        difference([(1.0, 2.0)] * 3, [(1.0, 2.0)] * 2)


def test_the_same_marks_have_the_same_interval():
    marks = word_errors(np.random.default_rng(0), 0.1)
    assert interval(marks) == interval(marks)


# -- tools/compare_results.py ------------------------------------------------------------------------------


@pytest.fixture
def evaluation(tmp_path):
    """Writes an evaluation of one speech-QA set with these answers, and one of recognition with these errors."""

    def write(name: str, right: list[bool], errors: list[int], **facts: object) -> Path:
        folder = tmp_path / name
        place = folder / "m-boost"
        place.mkdir(parents=True)
        qa = {"task": "sqa", "folder": "m-boost", "checksum": "c", **facts}
        row = {
            "stage": name,
            "mode": "boost",
            "decoding": "greedy",
            "sets": {"qa": qa, "asr": qa | {"task": "asr"}},
        }
        (folder / "results.json").write_text(json.dumps([row]))
        lines = {
            "qa": [
                {"reference": ["yes"], "text": said, "heard": said, "marks": {"sqa_s2t_accuracy": [float(one), 1.0]}}
                for one in right
                for said in ["yes" if one else "no"]
            ],
            "asr": [
                {"reference": "a b", "text": f"{one} wrong", "heard": None, "marks": {"asr_wer": [float(one), 10.0]}}
                for one in errors
            ],
        }  # fmt: skip
        for task, entries in lines.items():
            text = "".join(
                json.dumps({"id": f"{task}{number}", "failure": None} | entry) + "\n"
                for number, entry in enumerate(entries)
            )
            (place / f"{task}.jsonl").write_text(text)
        return folder

    return write


def test_a_comparison_says_what_differs_and_shows_what_changed(evaluation, capsys):
    first = evaluation("before", [True] * 30 + [False] * 30, [1, 2, 3] * 20)
    second = evaluation("after", [True] * 50 + [False] * 10, [1, 3, 2] * 20)
    main([str(first), str(second), "--show", "2"])
    said = capsys.readouterr().out
    qa, recognition = said.index("qa · S→T %"), said.index("asr · WER %")
    assert qa < recognition, "real differences come first"
    assert "before -> after, boost · qa · S→T %: 50.0 -> 83.3 on 60 items" in said
    assert ": differs" in said[qa:recognition]
    assert "qa30: wanted 'yes', A 'no', B 'yes'" in said
    assert "… and 18 more that changed" in said
    assert "no difference shown" in said[recognition:]
    assert said.rstrip().endswith("1 of 2 scores differ by more than chance")


def test_items_that_only_one_run_answered_are_left_out(evaluation):
    first, second = evaluation("a", [True] * 10, [1] * 10), evaluation("b", [True] * 10, [1] * 10)
    path = second / "m-boost" / "qa.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3] |= {"failure": "broken", "marks": {}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (qa,) = [one for one in compare(str(first), str(second)) if one.name == "qa"]
    assert (qa.items, qa.changed, qa.is_significant) == (9, (), False)
    assert qa.column == Column("S→T %", "sqa_s2t_accuracy")


def test_another_test_set_or_recogniser_is_said(evaluation, capsys):
    first = evaluation("a", [True, False], [1, 2], recogniser="whisper")
    second = evaluation("b", [True, False], [1, 2], recogniser="sensevoice", checksum="d")
    main([str(first), str(second)])
    said = capsys.readouterr().out
    assert "note: the checksum differs: c, d" in said
    assert "note: the recogniser differs: whisper, sensevoice" in said


def test_rows_are_chosen_by_their_folder(evaluation, capsys):
    folder = evaluation("a", [True, False], [1, 2])
    main([f"{folder}#m-boost", f"{folder}#m-boost"])
    assert "m-boost -> m-boost · qa" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"#other: no row of this name; .* has m-boost"):
        compare(f"{folder}#other", str(folder))
    with pytest.raises(ValueError, match="no results there; give the OUTPUT_DIR"):
        compare(str(folder / "nowhere"), str(folder))
