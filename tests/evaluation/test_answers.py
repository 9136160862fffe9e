"""The published rule for answers, and the strict one."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.evaluation import contains_answer
from vita_audio.evaluation.answers import answer_words

GOLDENS = Path(__file__).parents[1] / "goldens" / "data" / "metrics"


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDENS / name).read_bytes().split(b"\n") if line]


@pytest.mark.parametrize("row", read_lines("acc_contain_pairs.jsonl"), ids=lambda row: str(row["answer"]))
def test_containment_equals_the_recorded_verdicts(row):
    if row["raises"]:
        with pytest.raises(TypeError):
            contains_answer(row["prediction"], row["answer"])
    else:
        assert contains_answer(row["prediction"], row["answer"]) is row["correct"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("eight", "eight", True),
        ("eighteen", "eight", False),
        ("it is 8", "eight", True),
        ("it is eight", "8", True),
        ("a catalogue", "cat", False),
        ("the answer is 3 and 5", "3.5", False),
        ("twenty one", "twenty-one", True),
        ("three five", "eight", False),
        ("three five", "five", True),
        ("New York, of course", "new york", True),
        ("york is new", "New York", False),
        ("anything", "...", False),
        ("it is red", ["blue", "red"], True),
        ("it is five", ["no number", "5"], True),
        ("答案是北京", "北京", True),
        ("答案是北京。", "北 京", True),
        ("答案是南京", "北京", False),
        ("正解は東京です", "東京", True),
        ("정답은 서울입니다", "서울", True),
        ("in Beijing (北京)", "北京", True),
        ("it is one hundred and twenty", "120", True),
        ("it is 120", "one hundred and twenty", True),
        ("it is one hundred and twenty", "20", False),
        ("it is one hundred and twenty", "one hundred", False),
        ("a hundred and one dalmatians", "101", True),
        ("two million three hundred thousand", "2,300,000", True),
        ("two and three", "5", False),
        ("between one hundred and two hundred", "200", True),
        ("pi is three point one four", "3.14", True),
        ("3.50", "3.5", True),
        ("共一百二十人", "120", True),
        ("共120人", "一百二十", True),
        ("共一百二十人", "20", False),
        ("一九九九年", "1999", True),
        ("STRASSE", "straße", True),
        ("it is -5 degrees", "minus five", True),
        ("it is minus five", "5", False),
        ("it is 5 degrees", "-5", False),
        ("ten minus five", "five", True),
        ("chapters 3-5", "5", True),
        ("the twenty-first century", "21st century", True),
        ("the 3rd", "third", True),
        ("the third man", "3", False),
        ("he came twenty first", "20", False),
        ("1.5 million people", "1500000", True),
        ("five million", "5 million", True),
        (".5", "zero point five", True),
        ("fifty percent", "50 %", True),
        ("50%", "50", True),
        ("一百二", "120", True),
        ("一百零二", "102", True),
        ("一萬二", "12000", True),
        ("三点一四", "3.14", True),
        ("负五", "-5", True),
        ("Ｔｏｋｙｏ", "Tokyo", True),
        ("İstanbul", "istanbul", True),
        ("the U.S.A.", "USA", True),
        ("Pa\u200bris\u200e", "Paris", True),
        ("القَاهِرَة", "القاهرة", True),
    ],
)
def test_whole_words_do_not_match_inside_other_words(prediction, answer, expected):
    assert contains_answer(prediction, answer, whole_words=True) is expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("five hundred thousand and one", ["500001"]),
        ("twenty hundred", ["2000"]),
        ("nineteen ninety nine", ["19", "99"]),
        ("one two three", ["1", "2", "3"]),
        ("hundred hundred", ["100", "100"]),
        ("a million reasons", ["1000000", "reasons"]),
        ("a point", ["a", "point"]),
        ("rock and roll", ["rock", "and", "roll"]),
        ("12,34", ["12", "34"]),
        ("1,234,567.50", ["1234567.5"]),
        ("007", ["7"]),
        ("٣", ["3"]),
        ("三万五千 一千零五 十二 两百", ["35000", "1005", "12", "200"]),
        ("it’s the café's", ["it's", "the", "café's"]),
        ("हिन्दी है", ["हिन्दी", "है"]),
    ],
)
def test_numbers_are_compared_by_value_and_words_without_punctuation(text, words):
    assert answer_words(text) == words


@pytest.mark.parametrize("whole_words", [False, True])
def test_accents_match_in_either_form(whole_words):
    composed, decomposed = (unicodedata.normalize(form, "Orléans") for form in ("NFC", "NFD"))
    assert contains_answer(f"in {composed}", decomposed, whole_words=whole_words)
    assert contains_answer(f"in {decomposed}", composed, whole_words=whole_words)


NUMBER_WORDS = (
    "zero one eight ten twenty hundred thousand million 7 and point a 三 百 万 亿 〇 点 负 "
    "minus -5 first 3rd hundredth 2%"
).split()


@settings(deadline=None)
@given(st.lists(st.sampled_from(NUMBER_WORDS), max_size=8))
def test_any_run_of_number_words_contains_itself(words):
    text = " ".join(words)
    assert contains_answer(text, text, whole_words=True) is bool(words)


@settings(deadline=None)
@given(st.integers(0, 10**12 - 1), st.booleans())
def test_a_number_in_words_is_the_number(value, british):
    assert answer_words(in_words(value, " and " if british else " ")) == [str(value)]


def in_words(value: int, joint: str) -> str:
    """English, written here without any of the code under test."""
    for scale, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if value >= scale:
            rest = value % scale
            link = joint if 0 < rest < 100 else " "
            head = f"{in_words(value // scale, joint)} {name}"
            return head if not rest else f"{head}{link}{in_words(rest, joint)}"
    if value >= 100:
        rest = value % 100
        return f"{in_words(value // 100, joint)} hundred" + (
            f"{joint}{in_words(rest, joint)}" if rest else ""
        )
    small = (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen"
    ).split()
    if value < 20:
        return small[value]
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens}-{small[value % 10]}"
