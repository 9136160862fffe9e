"""Flags made from dataclasses: every option once."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from vita_audio.cli.arguments import (
    CODEC,
    GENERATION,
    RUNTIME,
    OptionGroup,
    add_system_prompt,
    attribute_docs,
    command_parser,
    one_line_refusals,
    transcriber_group,
)
from vita_audio.inference import CodecOptions, GenerationOptions, RuntimeOptions

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """Settings of a test.

    Attributes:
        count: how many, of :class:`~some.where.Thing`
            or of ``others``.
        ratio, share: two numbers.
        sizes: a list.
    """

    count: int = 3
    ratio: float | None = None
    share: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    quiet: bool = False
    pace: Literal["slow", "fast"] = "slow"
    folder: Path | None = None


GROUP = OptionGroup("settings", Settings, unset="the machine's choice")


def read(*words: str) -> Settings:
    parser = command_parser("A test.")
    GROUP.add_to(parser)
    return GROUP.read(parser.parse_args(words))


def test_without_flags_every_option_has_the_dataclass_default():
    assert read() == Settings()
    parser = command_parser(None)
    groups = [(GENERATION, GenerationOptions()), (CODEC, CodecOptions()), (RUNTIME, RuntimeOptions())]
    for group, _ in groups:
        group.add_to(parser)
    args = parser.parse_args([])
    for group, default in groups:
        assert group.read(args) == default


def test_values_have_the_types_of_the_fields():
    words = [
        "--count",
        "4",
        "--ratio=0.25",
        "--sizes",
        "5",
        "6",
        "--quiet",
        "--pace",
        "fast",
        "--folder",
        "a-b",
    ]
    assert read(*words) == Settings(4, 0.25, 0.5, [5, 6], True, "fast", Path("a-b"))


@pytest.mark.parametrize(
    ("words", "quiet"),
    [
        (["--quiet"], True),
        (["--quiet", "False"], False),
        (["--quiet", "true"], True),
        (["--no-quiet"], False),
    ],
)
def test_a_switch_takes_a_value_or_none_and_has_a_negative(words, quiet):
    assert read(*words).quiet is quiet


def test_dashes_and_underscores_are_one_in_flags_but_not_in_values():
    parser = command_parser("A test.")
    GENERATION.add_to(parser)
    parser.add_argument("--text")
    for flag in ("--max_new_tokens", "--max-new-tokens"):
        assert parser.parse_args([flag, "7"]).max_new_tokens == 7
        assert parser.parse_args([f"{flag}=7"]).max_new_tokens == 7
    assert parser.parse_args(["--text", "a-b --c-d"]).text == "a-b --c-d"
    assert GENERATION.read(parser.parse_args(["--mtp-inference-mode", "1", "10"])).schedule.numbers == [1, 10]


def test_the_help_is_the_docstring_with_the_default(capsys):
    docs = attribute_docs(Settings)
    assert docs["count"] == "how many, of Thing or of others"
    assert docs["ratio"] == docs["share"] == "two numbers"
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "how many, of Thing or of others (default: 3)" in shown
    assert "two numbers (default: the machine's choice)" in shown
    assert "a list (default: 1 2)" in shown


@pytest.mark.parametrize(
    "group", [GENERATION, CODEC, RUNTIME, transcriber_group()], ids=lambda group: group.title
)
def test_every_option_of_a_command_is_described(group):
    described = attribute_docs(group.holder)
    assert {entry.name for entry in fields(group.holder)} <= set(described)


def test_a_command_can_replace_a_default_and_read_can_fill_in_what_has_no_flag():
    parser = command_parser(None)
    GROUP.add_to(parser, count=9)
    args = parser.parse_args([])
    assert GROUP.read(args, quiet=True) == Settings(count=9, quiet=True)
    assert transcriber_group().left_out == ("device",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--quiet", "perhaps"], "argument --quiet: 'perhaps': give true or false"),
        (["--pace", "steady"], "argument --pace: invalid choice: 'steady'"),
        (["--cou", "4"], "unrecognized arguments: --cou 4"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(refusal, words, message):
    assert refusal(lambda words: read(*words), *words).startswith(message)


def test_a_type_without_a_single_reading_is_refused_when_the_flags_are_made():
    @dataclass
    class Odd:
        value: int | float = 1

    with pytest.raises(TypeError, match="no single reading"):
        OptionGroup("odd", Odd).add_to(command_parser(None))


def test_the_default_system_prompt_is_the_models_own():
    parser = command_parser(None)
    add_system_prompt(parser)
    assert parser.parse_args([]).system_prompt == "auto"


def test_an_error_keeps_its_traceback_where_the_environment_asks_for_it(monkeypatch):
    monkeypatch.setenv("VITA_AUDIO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="two\nlines"), one_line_refusals():
        raise ValueError("two\nlines")
    monkeypatch.delenv("VITA_AUDIO_TRACEBACK")
    with pytest.raises(SystemExit, match=r"^error: two$"), one_line_refusals():
        raise ValueError("two\nlines")


@pytest.mark.parametrize(
    "tool", ["inference_sts", "codec", "tokenize_audio", "inspect_data", "report", "benchmark"]
)
def test_every_tool_answers_to_help_under_its_documented_name(tool):
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(f"usage: {tool}.py")
