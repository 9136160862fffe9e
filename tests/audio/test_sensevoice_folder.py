"""tools/make_sensevoice.py: an untrained folder that has the parts of the released one."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from vita_audio.audio.sensevoice import Frontend, SenseVoiceEncoder

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens" / "sensevoice"


def make(folder, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "make_sensevoice.py", "--out", folder, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )


def test_the_made_folder_opens_as_frontend_and_encoder(tmp_path):
    clips = [str(GOLDENS / "wav_a_16k_mono.wav"), str(GOLDENS / "wav_b_44k1_stereo.wav")]
    samples = [{"messages": [], "audios": clips}, {"messages": []}]
    (tmp_path / "asr_train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    folder = tmp_path / "sensevoice"
    sizes = ["--output-size", "16", "--attention-heads", "2", "--num-blocks", "2", "--tp-blocks", "1"]
    done = make(folder, "--data", tmp_path / "asr_train.jsonl", *sizes)
    assert done.returncode == 0, done.stderr
    features = torch.cat([Frontend(folder)(clip) for clip in clips])
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(560), atol=1e-4, rtol=0)
    encoded, _ = SenseVoiceEncoder.from_pretrained(folder)(features[None])
    assert encoded.shape == (1, len(features) + 4, 16)
    again = make(tmp_path / "again", "--corpus", tmp_path, *sizes)
    assert again.returncode == 0, again.stderr
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_a_damaged_data_file_is_named_with_its_line(tmp_path):
    (tmp_path / "asr_train.jsonl").write_text('{"audios": []}\n{oops\n')
    done = make(tmp_path / "out", "--data", tmp_path / "asr_train.jsonl")
    assert done.returncode != 0
    assert "asr_train.jsonl:2" in done.stderr.strip().splitlines()[-1]


def test_a_corpus_without_audio_is_refused(tmp_path):
    done = make(tmp_path / "out", "--corpus", tmp_path)
    assert done.returncode != 0
    assert "names audio" in done.stderr.strip().splitlines()[-1]
