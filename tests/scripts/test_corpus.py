"""The spoken arithmetic corpus: its splits, its files, its sums."""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from vita_audio.chat.sample import parse_sample

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "quickstart" / "make_spoken_arithmetic.py"
TASKS = ("asr", "tts", "sqa", "text_qa", "voice_clone")
SPLITS = ("train", "dev", "test")
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen"
).split()


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    result = run("--out", folder, "--utterances", 150)
    assert result.returncode == 0, result.stderr
    return folder


def samples(corpus: Path, task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (corpus / f"{task}_{split}.jsonl").read_text().splitlines()]


def sentence(task: str, sample: dict) -> str:
    """What is transcribed, read or asked."""
    user, assistant = (message["content"] for message in sample["messages"][-2:])
    return {
        "asr": assistant,
        "tts": user.split("\n")[-1],
        "voice_clone": user.split("\n")[-1],
        "sqa": sample.get("question"),
        "text_qa": user,
    }[task]


def test_no_sentence_is_shared_between_splits_across_tasks(corpus):
    sentences = {
        split: {sentence(task, sample) for task in TASKS for sample in samples(corpus, task, split)}
        for split in SPLITS
    }
    assert all(sentences.values())
    assert not sentences["test"] & sentences["train"]
    assert not sentences["test"] & sentences["dev"]
    assert not sentences["dev"] & sentences["train"]


def test_no_recording_is_shared_between_splits_but_the_replies(corpus):
    recordings = {split: set() for split in SPLITS}
    for split in SPLITS:
        for task in TASKS:
            for sample in samples(corpus, task, split):
                audios = sample.get("audios", [])
                recordings[split].update(audios[:1] if task == "sqa" else audios)
    assert all(recordings.values())
    assert not recordings["test"] & (recordings["train"] | recordings["dev"])
    assert not recordings["dev"] & recordings["train"]


@pytest.mark.parametrize("task", TASKS)
def test_every_sample_is_in_the_training_format_and_its_audio_exists(corpus, task):
    for split in SPLITS:
        rows = samples(corpus, task, split)
        assert rows
        for row in rows:
            parsed = parse_sample(row)
            assert all((corpus / audio).is_file() for audio in parsed.audios)
        assert len({row["id"] for row in rows}) == len(rows)


def test_the_sums_are_right_and_every_pair_is_in_training(corpus):
    pairs = set()
    for split in SPLITS:
        for task in ("sqa", "text_qa"):
            for row in samples(corpus, task, split):
                a, b = (NUMBERS.index(word) for word in sentence(task, row).split() if word in NUMBERS)
                assert row["answers"] == [NUMBERS[a + b]]
                reply = f"{NUMBERS[a]} plus {NUMBERS[b]} is {NUMBERS[a + b]}"
                assert row["messages"][-1]["content"].split("\n")[0] == reply
                if split == "train" and task == "text_qa":
                    pairs.add((a, b))
    assert len(pairs) == 100


def test_recordings_are_16_khz_mono_and_as_long_as_their_words(corpus):
    for row in samples(corpus, "tts", "test"):
        info = soundfile.info(corpus / row["audios"][0])
        assert (info.samplerate, info.channels) == (16_000, 1)
        words = len(sentence("tts", row).split())
        assert 0.2 * words < info.duration < 0.7 * words + 0.5


def test_a_cloned_voice_is_the_voice_of_its_prompt(corpus):
    voices = set()
    for row in samples(corpus, "voice_clone", "train"):
        prompt, reading = (Path(audio) for audio in row["audios"])
        assert prompt.parent == reading.parent
        assert prompt != reading
        voices.add(prompt.parent.name)
    assert len(voices) == 3


def spoken(task: str, sample: dict) -> set[str]:
    """What is asked, transcribed or read, and the reply to a question."""
    replies = {sample["messages"][-1]["content"].split("\n")[0]} if task in ("sqa", "text_qa") else set()
    return {sentence(task, sample)} | replies


def grammar_pattern(grammar: str) -> re.Pattern:
    """What a JSGF grammar allows, as a regular expression over words with a space behind each."""
    rules = dict(re.findall(r"<(\w+)> = ([^;]+);", grammar))

    def expand(part: str) -> str:
        if part.startswith("<"):
            inner = re.findall(r"<\w+>|[a-z]+|[|+]", rules[part[1:-1]])
            return f"(?:{''.join(map(expand, inner))})"
        return f"(?:{part} )" if part.isalpha() else part

    return re.compile(expand("<utterance>"))


def test_the_grammar_allows_every_spoken_sentence(corpus):
    pocketsphinx = pytest.importorskip("pocketsphinx")
    grammar = corpus / "grammar.jsgf"
    # Fails on a word outside the dictionary or a broken rule.
    pocketsphinx.Decoder(lm=None, loglevel="FATAL").add_jsgf_file("corpus", str(grammar))
    allowed = grammar_pattern(grammar.read_text())
    for task in TASKS:
        for split in SPLITS:
            for row in samples(corpus, task, split):
                for text in spoken(task, row):
                    assert allowed.fullmatch(text + " "), text


def test_an_interrupted_run_continues_and_gives_the_same_files(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    victims = sorted((tmp_path / "corpus" / "audio").rglob("*.wav"))[::7]
    for victim in victims:
        victim.unlink()
    (tmp_path / "corpus" / "tts_test.jsonl").unlink()
    result = run("--out", tmp_path / "corpus", "--utterances", 150, "--workers", 1)
    assert result.returncode == 0, result.stderr
    files = [path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file()]
    matching, different, missing = filecmp.cmpfiles(corpus, tmp_path / "corpus", files, shallow=False)
    assert (different, missing) == ([], [])
    assert len(matching) == len(files)


def test_another_seed_gives_another_corpus(corpus, tmp_path):
    assert run("--out", tmp_path, "--utterances", 150, "--seed", 1).returncode == 0
    assert (tmp_path / "tts_test.jsonl").read_text() != (corpus / "tts_test.jsonl").read_text()


def test_without_a_synthesiser_one_line_says_what_to_install(tmp_path):
    (tmp_path / "espeakng_loader.py").write_text("raise ImportError('not here')\n")
    blind = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; sys.argv = ['tool']\n"
    blind += f"import runpy; runpy.run_path({str(TOOL.with_name('espeak.py'))!r}, run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", blind],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode == 1
    assert result.stderr.count("error:") == 1
    assert "pip install espeakng-loader" in result.stderr


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--out", tmp_path / "file" / "corpus", "--utterances", 150)
    assert result.returncode == 1
    assert re.fullmatch(r"error: .*Not a directory.*\n", result.stderr.splitlines(keepends=True)[-1])
