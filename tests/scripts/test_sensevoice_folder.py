"""tools/quickstart/make_sensevoice.py: an untrained folder that has the parts of the released one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vita_audio.audio.sensevoice import Frontend, SenseVoiceEncoder

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"
CLIPS = [str(GOLDENS / "wav_a_16k_mono.wav"), str(GOLDENS / "wav_b_44k1_stereo.wav")]
SIZES = ["--output-size", "16", "--attention_heads", "2", "--num_blocks", "2", "--tp_blocks", "1"]


@pytest.fixture
def make(maker):
    def run(out: Path, *arguments: object) -> None:
        maker("make_sensevoice").main(["--out", str(out), *map(str, arguments)])

    return run


def test_the_made_folder_opens_as_frontend_and_encoder(make, tmp_path):
    said = {"role": "assistant", "content": "words"}
    samples = [
        {"messages": [{"role": "user", "content": "<|audio|><|audio|>"}, said], "audios": CLIPS},
        {"messages": [{"role": "user", "content": "hello"}, said]},
    ]
    (tmp_path / "asr_train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    folder = tmp_path / "sensevoice"
    make(folder, "--data", tmp_path / "asr_train.jsonl", *SIZES)
    features = torch.cat([Frontend(folder)(clip) for clip in CLIPS])
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(560), atol=1e-4, rtol=0)
    encoded, _ = SenseVoiceEncoder.from_pretrained(folder)(features[None])
    assert encoded.shape == (1, len(features) + 4, 16)
    make(tmp_path / "again", "--corpus", tmp_path, *SIZES)
    weights = (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights


def test_a_damaged_data_file_is_named_with_its_line(make, tmp_path):
    sample = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "asr_train.jsonl").write_text(json.dumps(sample) + "\n{oops\n")
    with pytest.raises(ValueError, match=r"^[^\n]*asr_train\.jsonl:2: not JSON[^\n]*$"):
        make(tmp_path / "out", "--data", tmp_path / "asr_train.jsonl")


def test_a_corpus_without_audio_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match=r"no \*_train\.jsonl there"):
        make(tmp_path / "out", "--corpus", tmp_path)
    sample = {"messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "asr_train.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(ValueError, match="no sample names audio"):
        make(tmp_path / "out", "--corpus", tmp_path)
