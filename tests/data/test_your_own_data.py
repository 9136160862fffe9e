"""docs/your_own_data.md works as described, as far as that can be tested without a trained model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from vita_audio.chat import read_samples
from vita_audio.cli.evaluate import _set_names
from vita_audio.cli.prepare_data import main
from vita_audio.data.mixing import Mix, read_mix
from vita_audio.evaluation.evaluate import folder_name

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "your_own_data.md").read_text(encoding="utf-8")
CLIPS = 60


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)[0]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of recordings, made into samples by the guide's own command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROOT_PATH", raising=False)
    (tmp_path / "own").mkdir()
    for index in range(CLIPS):
        tone = 0.2 * np.sin(np.arange(8000) / (5 + index))
        soundfile.write(tmp_path / "own" / f"{index:03d}.wav", tone, 8000)
        (tmp_path / "own" / f"{index:03d}.txt").write_text(f"number {index}\n")
    tool, *options = block("bash").split()[1:]  # the command under test
    assert tool == "tools/prepare_data.py"
    main(options)
    return tmp_path


def test_recordings_become_samples_with_their_own_test_set(own):
    samples = {
        name: [sample for _, sample in read_samples(own / "own" / f"{name}.jsonl")]
        for name in ("asr", "tts", "asr_test", "tts_test")
    }
    assert [len(found) for found in samples.values()] == [50, 50, 10, 10]
    assert all(os.path.isfile(audio) for found in samples.values() for one in found for audio in one.audios)
    trained = {one.id for name in ("asr", "tts") for one in samples[name]}
    assert not trained & {one.id for name in ("asr_test", "tts_test") for one in samples[name]}


def test_the_mix_has_the_shares_that_the_guide_names(own, text_sample, write_lines, arrow_cache):
    for task in ("sqa", "asr", "tts", "text_qa"):
        write_lines(own / "quickstart" / "corpus" / f"{task}_train.jsonl", [text_sample("old")] * 400)
    (own / "own.yaml").write_text(block("yaml"))
    mix = Mix(read_mix(own / "own.yaml", own), 0, cache_dir=arrow_cache, strict=True)
    assert mix.used == [100, 100, 150, 150, 150, 150]
    assert "An epoch is 800 samples, a quarter of them new." in GUIDE
    assert sum(mix.used[:2]) / len(mix) == 0.25


def test_every_file_that_the_guide_names_is_there():
    for path in re.findall(r"(?:tools|scripts|configs)/[\w/.]+\.(?:py|sh|yaml)", GUIDE):
        assert (REPOSITORY / path).is_file(), path
    [maker] = (REPOSITORY / "tools").rglob("make_spoken_arithmetic.py")
    corpus = maker.read_text(encoding="utf-8")
    for name in re.findall(r"quickstart/corpus/(\w+)_(?:train|test)\.jsonl", GUIDE):
        assert name in corpus, name


def test_every_variable_that_the_guide_sets_is_read_by_a_script():
    scripts = "".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "scripts").rglob("*.sh"))
    for command in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL):
        for name in re.findall(r"\b([A-Z][A-Z_0-9]+)=", command):
            assert name in scripts, name


def test_the_result_that_the_guide_reads_is_the_one_that_its_evaluation_writes():
    evaluation = next(
        command for command in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL) if "MODES=" in command
    )
    files = [
        Path(file)
        for value in re.findall(r'_JSON="?([^"\s]+(?: [^"=]+)?)', evaluation)
        for file in value.split()
    ]
    names = _set_names([("", file) for file in files])
    modes = re.search(r'MODES="(.*?)"', evaluation)[1].split()
    stages = re.findall(r"(\w+)=\S+", re.search(r'MODEL_NAME_OR_PATH="(.*?)"', evaluation)[1])
    folder = re.search(r"OUTPUT_DIR=(\S+)", evaluation)[1]
    written = {
        f"{folder}/{folder_name(stage, mode, 'greedy')}/{name}.jsonl"
        for stage in stages
        for mode in modes
        for name in names
    }
    read = re.findall(r"read `(\S+\.jsonl)`", GUIDE)
    assert read
    assert set(read) <= written
