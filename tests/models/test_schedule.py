"""Schedules from names, text and numbers, and what they say."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vita_audio.models.schedule import BACKBONE, SCHEDULES, Schedule, schedules_for

all_pairs = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        ("Boost", [1, 10, 4, 10]),
        ("1 10", [1, 10]),
        ("[8192, 0]", [8192, 0]),
        ("(1,10,4,10)", [1, 10, 4, 10]),
        ("1-4-3-8", [1, 4, 3, 8]),
        ((2, 3), [2, 3]),
        (Schedule(((1, 10),)), [1, 10]),
    ],
)
def test_a_schedule_comes_by_name_text_or_numbers(value, numbers):
    assert Schedule.parse(value).numbers == numbers


@pytest.mark.parametrize(
    "value",
    ["fast", "1", "0 10", [1, 2, 3], "", "1 -10", "1 - 10", "1 10.5", "1--10", "-1 10", "1 10 and 4 10"],
)
def test_an_invalid_schedule_is_refused(value):
    with pytest.raises(ValueError, match="mtp_inference_mode="):
        Schedule.parse(value)


@given(all_pairs)
def test_a_schedule_survives_its_text_and_its_numbers(pairs):
    schedule = Schedule(tuple(pairs))
    assert Schedule.parse(schedule.name) == schedule
    assert Schedule.parse(schedule.numbers) == schedule


def test_the_schedules_of_the_paper_have_names():
    assert [Schedule.parse(numbers).name for numbers in SCHEDULES.values()] == list(SCHEDULES)
    assert Schedule.parse([2, 3]).name == "2 3"


@given(pairs=all_pairs, num_heads=st.integers(1, 4))
def test_a_schedule_yields_its_steps(pairs, num_heads):
    schedule = Schedule(tuple(pairs))
    length = sum(schedule.numbers) + 3 * sum(pairs[-1])
    steps = list(islice(schedule.steps(num_heads), length))
    for backbone_tokens, head_tokens in [*pairs, pairs[-1], pairs[-1], pairs[-1]]:
        run, steps = steps[: backbone_tokens + head_tokens], steps[backbone_tokens + head_tokens :]
        assert set(run[:backbone_tokens]) == {BACKBONE}
        cycle = [*range(num_heads), BACKBONE]
        assert run[backbone_tokens:] == [cycle[i % len(cycle)] for i in range(head_tokens)]
    assert not steps


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (0, ["vanilla"]),
        (1, ["vanilla", "1 1"]),
        (2, ["vanilla", "1 2"]),
        (10, ["vanilla", "balance", "boost", "turbo"]),
    ],
)
def test_a_model_is_scored_in_the_schedules_that_its_heads_suffice_for(heads, expected):
    assert schedules_for(heads, list(SCHEDULES)) == expected


def test_names_may_have_space_around_them():
    assert Schedule.parse(" Boost\n").name == "boost"


@pytest.mark.parametrize("value", [None, 5, b"boost", {"boost": 1}, ["1", "10"]], ids=repr)
def test_an_invalid_schedule_is_refused_in_one_line(value):
    with pytest.raises(ValueError, match=r"^mtp_inference_mode=[^\n]+$"):
        Schedule.parse(value)
