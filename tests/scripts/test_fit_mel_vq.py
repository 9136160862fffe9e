"""The command that fits the embedded codec."""

import json
from pathlib import Path

import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.audio.mel_vq import MelVQTokenizer


@pytest.fixture
def corpus(tmp_path) -> Path:
    torch.manual_seed(0)
    names = [f"{index}.wav" for index in range(6)]
    for name in names:
        save_audio(tmp_path / name, 0.1 * torch.randn(16_000), 16_000)
    messages = [{"role": "user", "content": "<|audio|>"}, {"role": "assistant", "content": "noise"}]
    lines = [json.dumps({"messages": messages, "audios": [name]}) for name in names]
    (tmp_path / "asr_train.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def fit(maker):
    def run(corpus: Path, out: Path, *arguments: str) -> None:
        options = ["--codes", "16", "--epochs", "1", *arguments]
        maker("fit_mel_vq").main(["--corpus", str(corpus), "--out", str(out), *options])

    return run


def test_every_clip_is_used_or_as_many_as_requested(fit, corpus, capsys):
    fit(corpus, corpus / "whole")
    assert "16 codes from 6 clips" in capsys.readouterr().out
    for name in ("a", "b"):
        fit(corpus, corpus / name, "--max-clips", "3")
        assert "16 codes from 3 clips" in capsys.readouterr().out
    prints = [MelVQTokenizer.from_pretrained(corpus / name).fingerprint for name in ("whole", "a", "b")]
    assert prints[1] == prints[2] != prints[0]


def test_unusable_input_is_refused_in_one_line(fit, corpus, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ValueError, match=r"^[^\n]*: no \*_train\.jsonl there[^\n]*$"):
        fit(empty, empty / "codec")
    with pytest.raises(SystemExit):
        fit(corpus, corpus / "codec", "--max_clips", "0")
    assert capsys.readouterr().err.startswith("error: --max_clips 0: give 1 or more")
    (corpus / "0.wav").unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*0\.wav[^\n]*$"):
        fit(corpus, corpus / "codec")
    (corpus / "asr_train.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(ValueError, match="no sample names audio"):
        fit(corpus, corpus / "codec")
