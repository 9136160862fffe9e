"""Voices are compared as published, and the embedded measure tells voices apart."""

from __future__ import annotations

import math

import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.evaluation.similarity import SpeakerConfig, SpectralEncoder
from vita_audio.evaluation.wavlm import WavLMSpeakerEncoder


def noise(seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(60_000, generator=torch.Generator().manual_seed(1000 + seed))


def test_embeddings_equal_those_of_the_first_release(golden, released):
    encoder = SpeakerConfig("wavlm", str(released.parent)).open()
    for seed, expected in enumerate(golden["embeddings"]):
        torch.testing.assert_close(encoder.embed(noise(seed)), torch.tensor(expected), atol=2e-5, rtol=1e-4)


def test_similarity_is_the_cosine_of_two_files(golden, released, tmp_path):
    for seed in range(2):
        save_audio(tmp_path / f"{seed}.wav", noise(seed), 16_000)
    encoder = WavLMSpeakerEncoder(released)
    similarity = encoder.similarity(tmp_path / "0.wav", str(tmp_path / "1.wav"))
    assert similarity == pytest.approx(golden["cosine"], abs=1e-4)
    assert encoder.similarity(tmp_path / "0.wav", str(tmp_path / "0.wav")) == pytest.approx(1.0)


def test_missing_and_foreign_weights_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"wavlm_large_finetune\.pth: no such file"):
        SpeakerConfig("wavlm", str(tmp_path)).check()
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "wavlm_large_finetune.pth")
    with pytest.raises(ValueError, match=r"not the weights of wavlm_large_finetune\.pth"):
        SpeakerConfig("wavlm", str(tmp_path)).open()
    with pytest.raises(ValueError, match="unknown speaker embedding 'x'; known: wavlm, spectral"):
        SpeakerConfig("x").check()


def test_other_weights_have_another_fingerprint(released, tmp_path):
    first = SpeakerConfig("wavlm", str(released)).fingerprint()
    content = bytearray(released.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "wavlm_large_finetune.pth").write_bytes(content)
    assert SpeakerConfig("wavlm", str(tmp_path)).fingerprint() != first


def test_the_embedded_measure_tells_two_voices_apart():
    def voice(pitch: float, tilt: float, seed: int) -> torch.Tensor:
        """Harmonics of a pitch with a spectral tilt, and noise."""
        time = torch.arange(16_000) / 16_000
        harmonics = (torch.sin(2 * math.pi * pitch * k * time) * k**-tilt for k in range(1, 20))
        hiss = torch.randn(16_000, generator=torch.Generator().manual_seed(seed))
        return 0.1 * sum(harmonics) + 0.001 * hiss

    encoder = SpectralEncoder()
    low, again, high = (
        encoder.embed(voice(*settings)) for settings in ((110, 1.0, 1), (114, 1.0, 2), (240, 0.3, 3))
    )
    alike = torch.cosine_similarity(low, again, dim=0)
    assert alike > torch.cosine_similarity(low, high, dim=0) + 0.02
    assert alike > 0.95
