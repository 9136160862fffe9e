"""scripts/finetune_own_data.sh: from samples to a merged model that has spoken, and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vita_audio.cli import own_voice
from vita_audio.models import open_model

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts/finetune_own_data.sh"


@pytest.fixture
def data(tiny_world, tmp_path) -> Path:
    """Recordings as tools/prepare_data.py writes them: transcription and reading aloud."""
    for task in ("asr", "tts"):
        (tmp_path / f"{task}.jsonl").write_text((json.dumps(tiny_world.samples[task]) + "\n") * 8)
    (tmp_path / "old.jsonl").write_text((json.dumps(tiny_world.samples["sqa"]) + "\n") * 4)
    return tmp_path


def run(tiny_world, *words, **settings) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "DATA_ROOT": str(tiny_world.data_dir),
        "NPROC_PER_NODE": "1",
        "REPORT_TO": "none",
        **settings,
    }
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def model_and_codec(tiny_world) -> list[object]:
    return ["--model", tiny_world.model_dir, "--codec", tiny_world.codec_dir, "--codec_type", "mel_vq"]


@pytest.mark.slow
def test_samples_become_a_merged_model_that_has_spoken_and_a_second_call_trains_nothing(tiny_world, data):
    words = [
        data / "asr.jsonl",
        data / "tts.jsonl",
        *model_and_codec(tiny_world),
        "--old_data",
        data / "old.jsonl",
    ]
    words += ["--out", data / "out", "--steps", 2, "--seq_length", 512, "--rank", 4]
    ended = run(tiny_world, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "own data: ASR 8, TTS 8;" in ended.stderr
    assert "LoRA adapters: " in ended.stderr
    assert '"the quiet river runs" is spoken in ' in ended.stdout
    assert list((data / "out/spoken").glob("*.wav"))
    assert open_model(data / "out/model").config.num_nextn_predict_layers == 10
    assert not (data / "out/model/adapter_config.json").exists()
    before = (data / "out/model/model.safetensors").stat().st_mtime_ns
    again = run(tiny_world, *words)
    assert again.returncode == 0
    assert "is there already; delete" in again.stdout
    assert (data / "out/model/model.safetensors").stat().st_mtime_ns == before


def plan(tiny_world, data, *words) -> None:
    own_voice.main(
        [
            *map(str, (data / "asr.jsonl", data / "tts.jsonl", *words)),
            *("--out", str(data / "out"), "--data_root", str(tiny_world.data_dir)),
            *("--seq_length", "512", "--rows_per_step", "2"),
        ]
    )


def test_the_settings_fit_model_codec_and_data(tiny_world, data, capsys):
    plan(tiny_world, data, *model_and_codec(tiny_world), "--old_data", data / "old.jsonl")
    lines = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["NUM_HEADS"] == "10"
    assert lines["STAGE_SCRIPT"] == "finetune_glm4voice_mtp10_stage2.sh"
    assert lines["AUDIO_TOKENIZER_TYPE"] == "mel_vq"
    assert lines["MAX_STEPS"] == "40"  # a few samples still get some steps
    assert lines["SAY"] == "'the quiet river runs'"
    mix = (data / "out/mix.yaml").read_text()
    assert str(data / "tts.jsonl") in mix
    assert "num: 8 " in mix  # half as many as the sixteen own samples


def test_everything_that_would_stop_the_training_later_is_refused_in_one_line(tiny_world, data):
    def refusal(*words) -> str:
        with pytest.raises((ValueError, OSError)) as error:
            plan(tiny_world, data, *words)
        assert "\n" not in str(error.value)
        return str(error.value)

    model = ["--model", tiny_world.model_dir]
    assert "no such folder" in refusal("--model", data / "none", "--codec", tiny_world.codec_dir)
    assert "give the codec that the model was trained with" in refusal(*model, "--codec", data / "none")
    continuous = ["--codec", tiny_world.codec_dir, "--codec_type", "sensevoice_mel_vq"]
    assert "does not fit" in refusal(*model, *continuous)
    assert "old.txt" in refusal(*model_and_codec(tiny_world), "--old_data", data / "old.txt")
    sample = json.loads((data / "tts.jsonl").read_text().splitlines()[0])
    (data / "tts.jsonl").write_text(json.dumps(sample | {"audios": ["gone.wav"]}) + "\n")
    message = refusal(*model_and_codec(tiny_world))
    assert f"tts.jsonl, line 1: {tiny_world.audio('gone.wav')}: no such file; set DATA_ROOT" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "error: no data: give JSON lines of tools/prepare_data.py folder; see --help"),
        (["a.jsonl"], "error: no model: give --model, a released checkpoint or the result of stage 4"),
        (
            ["a.jsonl", "--modell", "x"],
            "error: unknown option --modell; see bash scripts/finetune_own_data.sh --help",
        ),
        (["a.jsonl", "--model"], "error: --model needs a value"),
    ],
)
def test_wrong_words_are_refused_in_one_line(tiny_world, words, said):
    ended = run(tiny_world, *words)
    assert ended.returncode == 2
    assert ended.stderr == f"{said}\n"
