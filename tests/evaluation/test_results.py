"""Which scores are reused: their inputs may change under the same path."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from vita_audio.evaluation.evaluate import BenchmarkSet, Checkpoint, Settings, evaluate
from vita_audio.evaluation.results import folder_fingerprint
from vita_audio.evaluation.tasks import SpeechRecognition, SpeechSynthesis
from vita_audio.evaluation.transcribers import TranscriberConfig
from vita_audio.inference import SpeechPipeline


@pytest.fixture
def world(tiny_world, tmp_path) -> Path:
    """A folder of one's own, whose files may change."""
    for name, folder in (
        ("model", tiny_world.model_dir),
        ("codec", tiny_world.codec_dir),
        ("data", tiny_world.data_dir),
    ):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "words.gram").write_text(
        "#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n"
    )
    return tmp_path


@pytest.fixture
def score(world, monkeypatch):
    """Scores the world's test sets and returns which replies and recordings were made for it."""
    made: list[str] = []
    for task in (SpeechRecognition, SpeechSynthesis):
        run = task.run
        monkeypatch.setattr(task, "run", lambda self, *a, run=run: made.append(self.name) or run(self, *a))
    recordings = "vita_audio.evaluation.evaluate.run_recordings"
    monkeypatch.setattr(recordings, lambda *_: made.append("recordings") or ([], []))

    def run_all(**settings: object) -> list[str]:
        made.clear()
        codec = {"path": folder_fingerprint(world / "codec")}
        ears = TranscriberConfig(grammar=str(world / "words.gram"))
        sets = [
            BenchmarkSet(task.name, task, path, task.read(path), ears if task.speaks else None)
            for task in (SpeechRecognition(), SpeechSynthesis())
            for path in [world / "data" / f"{task.name}.jsonl"]
        ]
        settings = {"speed_items": 0, "transcriber_processes": 0, "codec": codec} | settings

        def open_pipeline(folder: Path) -> SpeechPipeline:
            return SpeechPipeline.from_pretrained(folder, "mel_vq", world / "codec", device="cpu")

        checkpoint = Checkpoint("tiny", world / "model", ["turbo"])
        evaluate([checkpoint], sets, Settings(**settings), world / "out", open_pipeline)
        return list(made)

    return run_all


EVERYTHING = ["asr", "tts", "recordings"]


def test_scores_stay_until_something_behind_them_changes(world, score):
    assert score() == EVERYTHING
    assert score() == []

    # The test set, at the same size and time.
    path = world / "data" / "asr.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("blue key", "blue sea"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert score() == ["asr"]

    # A recording that it names.
    sound = bytearray((world / "data" / "reading.wav").read_bytes())
    sound[-1000] ^= 1
    (world / "data" / "reading.wav").write_bytes(sound)
    assert score() == ["tts", "recordings"]

    grammar = world / "words.gram"
    grammar.write_text(grammar.read_text().replace("blue", "green"))
    assert score() == ["tts", "recordings"]

    assert score(max_new_tokens=60) == ["asr", "tts"]
    assert score(batch_size=7) == ["asr", "tts"]


def test_scores_of_other_weights_are_not_kept(world, score):
    assert score() == EVERYTHING
    for name in ("model", "codec"):
        (weights,) = (world / name).glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-4] ^= 1
        before = weights.stat()
        weights.write_bytes(content)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert score() == (["asr", "tts"] if name == "model" else EVERYTHING), name
    config = world / "model" / "generation_config.json"
    config.write_text(json.dumps({"repetition_penalty": 1.05}))
    assert score() == ["asr", "tts"]


def test_a_folder_may_be_moved(world, score, tmp_path_factory):
    assert score() == EVERYTHING
    (world / "model").rename(world / "elsewhere")
    (world / "model").symlink_to(world / "elsewhere")
    assert score() == []


def test_scores_of_another_recogniser_are_not_kept(tmp_path, tiny_world):
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    (whisper / "config.json").write_text("{}")
    (whisper / "model.safetensors").write_bytes(b"one")
    task, path = SpeechSynthesis(), tiny_world.data_dir / "tts.jsonl"
    items = task.read(path)

    def fingerprint(config: TranscriberConfig) -> str:
        return BenchmarkSet("tts", task, path, items, config).fingerprint

    config = TranscriberConfig("whisper", str(whisper))
    first = fingerprint(config)
    assert fingerprint(config) == first
    (whisper / "model.safetensors").write_bytes(b"two")
    assert fingerprint(config) != first
    assert fingerprint(replace(config, language="de")) != fingerprint(config)
    other = BenchmarkSet("tts", SpeechSynthesis("libritts"), path, items, config).fingerprint
    assert other != fingerprint(config)


def test_a_damaged_scores_file_is_named(world, score):
    score()
    path = world / "out" / "tiny-turbo" / "asr_scores.json"
    path.write_text("{")
    with pytest.raises(
        ValueError, match=r"asr_scores\.json: not valid JSON .*; delete the file to score again"
    ):
        score()
