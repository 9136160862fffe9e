"""Bad utterances are rejected, each for its reason; test sets stay out of training."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.chat import read_samples
from vita_audio.cli import check_overlap, prepare_data
from vita_audio.cli.preparation_html import preparation_html
from vita_audio.corpora import Checks, Cleaning, Settings, TestSetIndex, prepare
from vita_audio.corpora.normalisers import normalise
from vita_audio.corpora.own import own_recipe
from vita_audio.corpora.text import is_doubled, is_of

RATE = 16_000
SENTENCE = "the quiet river runs past the mill"


def tone(seconds: float = 2.0, level: float = 0.3) -> np.ndarray:
    return level * np.sin(np.arange(int(RATE * seconds)) / 9)


def speech_and_silence(share: float) -> np.ndarray:
    return np.concatenate([tone(4 * (1 - share)), np.zeros(int(RATE * 4 * share))])


BAD = {
    "empty_text": ("... !", tone()),
    "doubled_text": (f"{SENTENCE} {SENTENCE}", tone(4)),
    "other_language": ("今天天气很好我们出去走走", tone(4)),
    "too_short": ("ok", tone(0.2)),
    "too_long": (SENTENCE * 9, tone(31)),
    "slow_speech": ("one", tone(5)),
    "fast_speech": (SENTENCE * 3, tone(1)),
    "clipped": (SENTENCE, np.clip(5 * tone(), -1, 1)),
    "silent": (SENTENCE, tone(2, 1e-4)),
    "audio_empty": (SENTENCE, np.zeros(0)),
}


@pytest.fixture
def voice(tmp_path) -> Path:
    """A folder with one clip for each reason, and three good ones."""
    folder = tmp_path / "voice"
    folder.mkdir()
    clips = {f"good{number}": (f"{SENTENCE} in year {number}", tone(3)) for number in range(3)}
    for name, (text, samples) in {
        **clips,
        **BAD,
        "mostly_silence": (SENTENCE, speech_and_silence(0.875)),
    }.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE, "FLOAT")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def run(folder: Path, root: Path, checks: Checks | None = None, **limits: float):
    recipe = own_recipe("own", "beside", ("en",), ("asr",), 0)
    [tally] = prepare(recipe, folder, root, Settings(cleaning=Cleaning(**limits)), checks).values()
    listed = [json.loads(line) for line in (root / "own/asr.rejected.jsonl").open(encoding="utf-8")]
    return tally, listed


def test_every_reason_is_given_to_its_utterance_and_listed(voice, tmp_path):
    tally, listed = run(voice, tmp_path / "root", max_seconds=30)
    expected = Counter(dict.fromkeys(BAD, 1)) + Counter({"silent": 1})
    assert tally.rejected == expected
    assert (tally.read, tally.samples) == (14, 3)
    assert {one["id"]: one["reason"] for one in listed} == {
        **{name: name for name in BAD},
        "mostly_silence": "silent",
    }
    assert all("\n" not in one["message"] and one["message"] for one in listed)
    assert tally.seconds == pytest.approx(9)


def test_limits_can_be_moved(voice, tmp_path):
    tally, _ = run(
        voice, tmp_path / "root", min_seconds=0, max_seconds=40, max_speed=200, max_clipped=1, max_silence=1
    )
    assert set(tally.rejected) == {
        "empty_text", "doubled_text", "other_language", "slow_speech", "silent", "audio_empty"
    }  # fmt: skip
    with pytest.raises(ValueError, match="min_seconds must be at least 0 and below max_seconds"):
        Cleaning(min_seconds=3, max_seconds=2)


def test_a_change_of_limits_prepares_again_and_none_does_not(voice, tmp_path):
    run(voice, tmp_path / "root")
    before = (tmp_path / "root/own/asr.jsonl").stat().st_mtime_ns
    run(voice, tmp_path / "root")
    assert (tmp_path / "root/own/asr.jsonl").stat().st_mtime_ns == before
    tally, _ = run(voice, tmp_path / "root", max_clipped=1)
    assert tally.samples == 5, "the clipped one, and the long one below 120 s"


def test_the_page_shows_reasons_and_both_histograms(voice, tmp_path):
    run(voice, tmp_path / "root", max_seconds=30)
    page = preparation_html([("own/asr", tmp_path / "root/own/asr.jsonl"), ("old", tmp_path / "old.jsonl")])
    assert "<td>own/asr</td><td>14</td><td>3</td><td>0.00</td>" in page
    for reason in BAD:
        assert f"{reason} " in page
    assert "title='3: 3 before, 3 after'" in page
    assert "title='31: 1 before, 0 after'" in page
    assert preparation_html([("old", tmp_path / "old.jsonl")]) == ""


def test_a_recogniser_rejects_what_it_hears_differently(voice, tmp_path):
    checks = Checks(recogniser=lambda: hears, name="x")
    tally, listed = run(voice, tmp_path / "root", checks, max_seconds=30, max_wer=0.2)
    assert tally.rejected["disagrees"] == 1
    [message] = [one["message"] for one in listed if one["reason"] == "disagrees"]
    assert "year 1" in message
    assert "is heard as 'something else'" in message


def hears(waveform: torch.Tensor, rate: int, text: str) -> tuple[float, str]:
    return (1.0, "something else") if text.endswith("year 1") else (0.1, text)


def test_the_real_recogniser_is_opened_by_the_command(tmp_path, sound):
    """Pocketsphinx does not know the warble, so every clip disagrees."""
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice/a.wav").write_bytes(sound(0))
    (tmp_path / "voice/a.txt").write_text(SENTENCE)
    prepare_data.main(
        ["folder", str(tmp_path / "voice"), "--root", str(tmp_path), "--tasks", "asr", "--agree"]
    )
    report = json.loads((tmp_path / "own/asr.report.json").read_text())
    assert report["rejected"] == {"disagrees": 1}
    assert "pocketsphinx" in report["checks"]


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "text", "expected"),
    [
        (
            ["gigaspeech", "sentence"],
            "AND I SAID <COMMA> NO <PERIOD> WHY <QUESTIONMARK>",
            "And I said, no. Why?",
        ),
        (["sentence"], "Already mixed Case I", "Already mixed Case I"),
        (["marks", "no_spaces"], "今天 <sil> 天气 [noise] 很 好 ok go", "今天天气很好 ok go"),
        (["simplified"], "電腦裡的資料", "电脑里的资料"),
        (["nfkc"], "ＡＢＣ１２３", "ABC123"),
        (["lower"], "LOUD", "loud"),
        (["punctuation"], "你好,世界!!  3.5 (好)", "你好，世界！ 3.5 （好）"),
        (["nfkc", "punctuation"], "ＡＢ，你好。。。对吗？？", "AB，你好…对吗？"),
        (["punctuation"], "“Well”， it’s fine....", '"Well", it\'s fine…'),
        (
            ["numbers_en"],
            "In 1999, 3 of 21 paid $3.50 or $1,250 on the 3rd: 50%, -5.25 and 007.",
            "In nineteen ninety-nine, three of twenty-one paid three dollars and fifty cents or one thousand two "
            "hundred and fifty dollars on the third: fifty percent, minus five point two five and zero zero seven.",
        ),
        (
            ["numbers_en"],
            "an MP3 of 1380123456 in v1.2.3",
            "an MP3 of one three eight zero one two three four five six in v1.2.3",
        ),
        (
            ["numbers_zh"],
            "2024年3月5日花了1,200块，-5.5℃，占50%，3/4的人，3-5个，打13812345678",
            "二零二四年三月五日花了一千二百块，负五点五摄氏度，占百分之五十，四分之三的人，三到五个，打一三八一二三四五六七八",
        ),
        (["numbers_zh"], "2024-03-05是007", "二零二四年三月五日是零零七"),
        ([], "  two\t spaces \nand lines ", "two spaces \nand lines"),
    ],
)
def test_texts_are_normalised_by_name(names, text, expected):
    assert normalise(text, names) == expected


def test_normalisers_of_the_command_follow_those_of_the_recipe(voice, tmp_path, capsys):
    flags = ["folder", str(voice), "--root", str(tmp_path), "--tasks", "asr", "--normalise"]
    prepare_data.main([*flags, "numbers_en", "lower"])
    texts = {sample.messages[-1].text for _, sample in read_samples(tmp_path / "own/asr.jsonl", tmp_path)}
    assert {f"{SENTENCE} in year {number}" for number in ("zero", "one", "two")} <= texts
    with pytest.raises(SystemExit):
        prepare_data.main([*flags, "roman"])
    assert "invalid choice: 'roman'" in capsys.readouterr().err


def test_a_doubled_text_is_told_from_words_that_repeat():
    assert is_doubled("go on then go on then")
    assert is_doubled("今天天气很好今天天气很好")
    assert not is_doubled("bye bye")
    assert not is_doubled("谢谢谢谢")
    assert not is_doubled("very very good indeed")


def test_the_script_tells_languages_apart():
    assert is_of("plain English, with café", ["en"])
    assert not is_of("plain 今天天气很好 mixed", ["en"])
    assert is_of("我用 Python 写代码", ["zh"])
    assert not is_of("only English here", ["zh"])
    assert is_of("only English here", ["zh", "en"])
    assert is_of("1 2 3", ["zh"])
    assert is_of("что угодно", [])


# -- test sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(tmp_path, write_lines, sound) -> Path:
    """A test set of recognition and of questions."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test/a.wav").write_bytes(sound(1))
    heard = {"role": "user", "content": "Convert the speech to text.\n<|audio|>"}
    asked = {"role": "user", "content": "<|audio|>"}
    samples = [
        {
            "messages": [heard, {"role": "assistant", "content": "The Quiet River runs, past the mill!"}],
            "audios": ["a.wav"],
        },
        {"messages": [asked, {"role": "assistant", "content": ["yes", "it is"]}], "audios": ["a.wav"]},
    ]
    return write_lines(tmp_path / "test/test.jsonl", samples)


def test_sentences_and_recordings_of_a_test_set_are_known_in_any_spelling_and_lossless_format(
    benchmark, tmp_path, sound
):
    index = TestSetIndex.of([benchmark])
    assert index.find("THE QUIET RIVER RUNS PAST THE MILL", None, 0) == f"{benchmark}:1"
    assert index.find("yes", None, 0) is None, "short answers occur everywhere"
    (tmp_path / "copy.flac").write_bytes(sound(1, "flac"))
    for audio, known in (("copy.flac", True), ("other.wav", False)):
        (tmp_path / "other.wav").write_bytes(sound(2))
        waveform, rate = torch.from_numpy(soundfile.read(tmp_path / audio, dtype="float32")[0]), RATE
        assert (index.find(None, waveform, rate) is not None) == known
    assert index.fingerprint != replace(index, sentences={}).fingerprint


def test_test_sets_do_not_enter_what_is_prepared(benchmark, tmp_path, sound):
    voice = tmp_path / "voice"
    voice.mkdir()
    for name, seed, text in (
        ("said", 5, SENTENCE),
        ("heard", 1, "quite another sentence"),
        ("good", 6, "a third one"),
    ):
        (voice / f"{name}.flac").write_bytes(sound(seed, "flac"))
        (voice / f"{name}.txt").write_text(text)
    prepare_data.main(
        ["folder", str(voice), "--root", str(tmp_path), "--tasks", "asr", "--test_sets", str(benchmark)]
    )
    listed = [json.loads(line) for line in (tmp_path / "own/asr.rejected.jsonl").open()]
    assert {one["id"]: one["reason"] for one in listed} == {"said": "in_test_set", "heard": "in_test_set"}
    assert [sample.id for _, sample in read_samples(tmp_path / "own/asr.jsonl", tmp_path)] == ["good"]


def test_a_text_set_loses_the_conversations_that_hold_a_test_sentence(benchmark, tmp_path, write_lines):
    rows = [
        {"instruction": text, "output": "An answer of some length."} for text in (SENTENCE, "Something else.")
    ]
    write_lines(tmp_path / "source/dataset.json", [json.dumps(rows)])
    flags = ["goat", str(tmp_path / "source"), "--root", str(tmp_path), "--test_sets", str(benchmark)]
    prepare_data.main(flags)
    report = json.loads((tmp_path / "datasets/jsonl/tiedong/goat/dataset.report.json").read_text())
    assert (report["samples"], report["rejected"]) == (1, {"in_test_set": 1})


def test_a_mix_with_a_sentence_or_a_recording_of_a_benchmark_is_caught(
    benchmark, tmp_path, sound, write_lines, text_sample, capsys, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    (tmp_path / "copy.flac").write_bytes(sound(1, "flac"))
    spoken = text_sample("Convert the speech to text.\n<|audio|>", "another sentence") | {
        "audios": ["copy.flac"]
    }
    clean = [text_sample("A question that is long enough", "an answer that is long enough")] * 3 + ["{broken"]
    mix = write_lines(
        tmp_path / "mix.yaml", ["dataset: {all: {ratio: 0, data_paths: [a.jsonl, lost.jsonl]}}"]
    )
    flags = [str(mix), "--test_sets", str(benchmark), "--data_root", str(tmp_path)]
    (tmp_path / "a.wav").write_bytes(sound(1))
    write_lines(tmp_path / "a.jsonl", clean)
    check_overlap.main(flags)
    assert (
        "no overlap: 3 samples compared with 1 sentences and 1 recordings of 1 test sets"
        in capsys.readouterr().out
    )

    write_lines(
        tmp_path / "a.jsonl", [*clean, text_sample("x", "the quiet river runs past the mill."), spoken]
    )
    with pytest.raises(SystemExit, match="2 overlaps of 5 samples"):
        check_overlap.main(flags)
    said = capsys.readouterr().out
    assert f"row 4: 'the quiet river runs past the mill.' is also in {benchmark}:1" in said
    assert "copy.flac' is also in" in said
    with pytest.raises(SystemExit, match="1 overlaps of 5 samples"):
        check_overlap.main([*flags, "--no_audio"])
