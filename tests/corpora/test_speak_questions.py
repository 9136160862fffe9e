"""Text questions become spoken ones: with a command, with the model itself, and checked by a recogniser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vita_audio.audio import load_audio
from vita_audio.chat import prompts, read_samples, sample_lines
from vita_audio.cli.speak_questions import main
from vita_audio.corpora.items import Rejected
from vita_audio.corpora.speaking import CommandSpeaker, speakable
from vita_audio.evaluation.metrics import word_error_rate
from vita_audio.evaluation.transcribers import TranscriberConfig

ESPEAK = Path(__file__).resolve().parents[2] / "tools/quickstart/espeak.py"
SAY = f"{sys.executable} {ESPEAK} {{voice}} {{out}} {{text}}"
GRAMMAR = (
    "#JSGF V1.0; grammar digits; public <said> = (one | two | three | four | five | plus | is | what | it)+ ;"
)


@pytest.fixture
def questions(tmp_path, write_lines, text_sample) -> Path:
    samples = [
        {"id": "a", **text_sample("What is one plus two?", "It is three.")},
        {"id": "b", **text_sample("What is *two* plus two?", "It is **four**.")},
        {"id": "code", **text_sample("What does this do?", "```python\nprint()\n```")},
        {"id": "long", **text_sample("What is " + "one plus " * 90 + "one?", "It is.")},
        {"id": "heard", **text_sample("<|audio|>", "It is one.")} | {"audios": ["x.wav"]},
        "{broken",
    ]
    return write_lines(tmp_path / "qa.jsonl", samples)


def speak(questions: Path, *flags: str) -> tuple[list, dict[str, str]]:
    """The samples, and the reason of each rejection."""
    root = questions.parent
    main([str(questions), "--root", str(root), *flags])
    listed = [json.loads(line) for line in (root / "spoken_qa.rejected.jsonl").open()]
    lines = list(sample_lines(root / "spoken_qa.jsonl"))
    samples = [sample for _, sample in read_samples(root / "spoken_qa.jsonl", root)] if lines else []
    return samples, {one["id"]: one["reason"] for one in listed}


def test_a_command_speaks_questions_and_answers_in_their_voices(questions, tmp_path):
    (tmp_path / "digits.gram").write_text(GRAMMAR)
    flags = ["--command", SAY, "--voices", "en-us", "en-us+f3", "--answer_voice", "en-us+f2"]
    samples, rejected = speak(questions, *flags)
    refused = {"code": "unspeakable", "long": "unspeakable", "heard": "unspeakable"}
    assert rejected == {**refused, "qa-0000005": "bad_row"}
    assert [sample.id for sample in samples] == ["a", "b"]
    for sample, answer in zip(samples, ("It is three.", "It is **four**."), strict=True):
        assert prompts.task_of(prompts.from_sample(sample)) == "speech QA"
        assert sample.messages[0].content == "<|audio|>"
        assert sample.messages[1].content == f"{answer}\n<|audio|>"
    heard = TranscriberConfig(grammar=str(tmp_path / "digits.gram")).open()
    said = [heard.transcribe(*load_audio(audio)) for audio in samples[1].audios]
    for heard_text, text in zip(said, ("what is two plus two", "it is four"), strict=True):
        assert word_error_rate(text, heard_text).rate <= 0.25
    once = (tmp_path / "spoken_qa.jsonl").read_bytes()
    (tmp_path / "spoken_qa.report.json").unlink()
    speak(questions, *flags)
    assert (tmp_path / "spoken_qa.jsonl").read_bytes() == once


def test_a_recogniser_rejects_what_was_spoken_wrongly(questions, tmp_path):
    (tmp_path / "digits.gram").write_text(GRAMMAR)
    check = ["--agree", "--grammar", str(tmp_path / "digits.gram"), "--max_wer", "0.3", "--no_answers"]
    samples, rejected = speak(questions, "--command", SAY, "--voices", "en-us", *check)
    assert [sample.id for sample in samples] == ["a", "b"]
    assert samples[0].messages[1].content == "It is three."
    assert rejected["code"] == "disagrees", "the grammar has no such words"
    wrong = SAY.replace("{text}", "'five five five {text}'")
    samples, rejected = speak(questions, "--command", wrong, "--voices", "en-us", *check)
    assert samples == []
    assert rejected["a"] == rejected["b"] == "disagrees"


def test_the_model_itself_speaks(questions, tiny_world, tmp_path, write_lines, text_sample):
    write_lines(questions, [{"id": "a", **text_sample("the quiet river runs", "the quiet river runs")}])
    model = ["--model_name_or_path", str(tiny_world.model_dir), "--device", "cpu"]
    codec = ["--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", str(tiny_world.codec_dir)]
    limits = ["--max_silence", "1", "--min_level", "-100", "--max_clipped", "1"]
    samples, rejected = speak(questions, *model, *codec, *limits)
    assert not rejected
    assert [len(sample.audios) for sample in samples] == [2]


def test_a_command_that_fails_is_said_in_one_line(questions, tmp_path):
    with pytest.raises(
        ValueError, match=r"^'espeak \{text\}': a text-to-speech command needs \{text\} and \{out\}$"
    ):
        CommandSpeaker("espeak {text}")
    with pytest.raises(ValueError, match=r"^no-such-program: no such program; [^\n]*$"):
        main([str(questions), "--root", str(tmp_path), "--command", "no-such-program {out} {text}"])
    marker = tmp_path / "ran"
    for command in ("false {out} {text}", f"echo '; touch {marker}' {{out}} {{text}}"):
        main([str(questions), "--root", str(tmp_path), "--command", command])
        report = json.loads((tmp_path / "spoken_qa.report.json").read_text())
        assert report["samples"] == 0
        assert report["rejected"] == {"bad_row": 1, "no_audio": 3, "unspeakable": 2}
    assert not marker.exists(), "no shell reads the command"


def test_what_nobody_reads_aloud_is_found():
    assert speakable("It is **very** _nice_, isn't it?", 100) == "It is very nice, isn't it?"
    for text in (
        "see https://x.y",
        "$x^2$",
        "| a | b |\n|---|---|",
        "- one\n- two",
        "`code`",
        "\\frac{1}{2}",
        "x" * 101,
    ):
        with pytest.raises(Rejected):
            speakable(text, 100)
