"""The command that fits the embedded codec."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.audio.mel_vq import MelVQTokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools/fit_mel_vq.py"


@pytest.fixture
def corpus(tmp_path) -> Path:
    torch.manual_seed(0)
    names = [f"{index}.wav" for index in range(6)]
    for name in names:
        save_audio(tmp_path / name, 0.1 * torch.randn(16_000), 16_000)
    (tmp_path / "asr_train.jsonl").write_text(
        "".join(json.dumps({"audios": [name]}) + "\n" for name in names)
    )
    return tmp_path


def fit(corpus: Path, *arguments: str) -> subprocess.CompletedProcess:
    options = ["--codes", "16", "--epochs", "1", *arguments]
    return subprocess.run(
        [sys.executable, str(TOOL), "--corpus", str(corpus), *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_clip_is_heard_or_as_many_as_asked_for(corpus):
    whole = fit(corpus, "--out", str(corpus / "whole"))
    parts = [fit(corpus, "--out", str(corpus / name), "--max-clips", "3") for name in ("a", "b")]
    assert "16 codes from 6 clips" in whole.stdout
    assert all("16 codes from 3 clips" in part.stdout for part in parts)
    prints = [MelVQTokenizer.from_pretrained(corpus / name).fingerprint for name in ("whole", "a", "b")]
    assert prints[1] == prints[2] != prints[0]


def test_what_cannot_be_fitted_is_said_in_one_line(corpus, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    run = fit(empty, "--out", str(empty / "codec"))
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(f"error: {empty}: no *_train.jsonl there")
    assert "--max-clips 0: give 1 or more" in fit(corpus, "--out", "codec", "--max-clips", "0").stderr
    (corpus / "0.wav").unlink()
    broken = fit(corpus, "--out", str(corpus / "codec"))
    assert broken.returncode == 1
    assert "0.wav" in broken.stderr.splitlines()[-1]
    assert "Traceback" not in broken.stderr
