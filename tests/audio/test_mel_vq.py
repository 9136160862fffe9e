"""The embedded codec on warbling tones: what is promised of every codec, and of its files."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio import AudioError, get_audio_tokenizer, save_audio
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.audio.spectrogram import GriffinLim, stft

RATE = 16_000


def warble(seconds: float, seed: int) -> torch.Tensor:
    """A harmonic tone that glides and pulses, in faint noise."""
    rng = random.Random(seed)
    time = torch.arange(int(RATE * seconds)) / RATE
    pitch = rng.uniform(120, 250) * (1 + 0.2 * torch.sin(2 * math.pi * rng.uniform(1, 3) * time))
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
    tone = sum(torch.sin(harmonic * phase) / harmonic for harmonic in range(1, 9))
    loudness = 0.5 + 0.5 * torch.sin(2 * math.pi * rng.uniform(2, 5) * time)
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    return 0.2 * tone * loudness + 0.003 * noise


@pytest.fixture(scope="module")
def codec() -> MelVQTokenizer:
    clips = [(warble(3.0, seed), RATE) for seed in range(20)]
    return MelVQTokenizer.fit(clips, MelVQConfig(codebook_size=64), epochs=3)


def test_there_are_12_5_codes_a_second(codec):
    assert codec.frame_rate == 12.5
    for samples, codes in ((1, 1), (1280, 1), (1281, 2), (16_000, 13), (48_000, 38)):
        assert len(codec.encode((warble(3.0, 1)[:samples], RATE))) == codes


def test_codes_lie_in_the_codebook_and_many_are_used(codec):
    codes = [code for seed in range(20) for code in codec.encode((warble(3.0, seed), RATE))]
    assert min(codes) >= 0
    assert max(codes) < codec.codebook_size == 64
    assert len(set(codes)) > 48


def test_encoding_ignores_loudness_and_sample_format(codec, tmp_path):
    waveform = warble(2.0, 100)
    codes = codec.encode((waveform, RATE))
    assert codec.encode((0.3 * waveform, RATE)) == codes
    save_audio(tmp_path / "clip.wav", waveform, RATE)
    assert codec.encode(tmp_path / "clip.wav") == codes
    assert codec.encode_batch([tmp_path / "clip.wav", (waveform, RATE)]) == [codes, codes]


def test_decoded_sound_has_the_spectrum_that_was_encoded(codec):
    waveform = warble(3.0, 3)
    codes = codec.encode((waveform, RATE))
    decoded = codec.decode(codes)
    assert decoded.dtype == torch.float32
    assert len(decoded) == 1280 * len(codes)
    assert decoded.abs().max() <= 1
    wanted = codec.spectra[codes].flatten(0, 1)
    error = (stft(decoded, 640, 160).abs() - wanted).norm() / wanted.norm()
    assert error < 0.35, f"relative spectral error {error:.2f}"
    # Another utterance of the same codec is much further away.
    other = codec.spectra[codec.encode((warble(3.0, 4), RATE))].flatten(0, 1)
    assert (other - wanted).norm() / wanted.norm() > 2 * error


def test_decoding_and_encoding_again_keeps_most_codes_near(codec):
    codes = codec.encode((warble(3.0, 5), RATE))
    again = codec.encode((codec.decode(codes), RATE))
    distance = (codec.codebook[codes] - codec.codebook[again]).norm(dim=1).mean()
    shuffled = (codec.codebook[codes] - codec.codebook[codes[::-1]]).norm(dim=1).mean()
    assert distance < 0.5 * shuffled


@given(cuts=st.lists(st.integers(0, 50), max_size=6))
@settings(max_examples=15, deadline=None)
def test_streamed_speech_equals_offline_speech_for_any_split(codec, cuts):
    codes = random.Random(0).choices(range(64), k=50)
    edges = [0, *sorted(cuts), len(codes)]
    stream = codec.stream()
    pieces = [stream.push(codes[a:b]) for a, b in itertools.pairwise(edges)]
    pieces.append(stream.push([], last=True))
    torch.testing.assert_close(torch.cat(pieces), codec.decode(codes), rtol=0, atol=0)


def test_a_stream_lags_at_most_five_codes_behind(codec):
    stream, emitted = codec.stream(), 0
    for pushed in range(1, 60):
        emitted += len(stream.push([pushed]))
        assert emitted > 1280 * (pushed - 5) - 480


def test_streams_do_not_share_state(codec):
    codes = random.Random(1).choices(range(64), k=30)
    first, second = codec.stream(), codec.stream()
    pieces = []
    for start in range(0, 30, 10):
        pieces.append(first.push(codes[start : start + 10], last=start == 20))
        second.push([7] * 10)
    torch.testing.assert_close(torch.cat(pieces), codec.decode(codes), rtol=0, atol=0)


def test_no_codes_give_no_sound(codec):
    assert len(codec.decode([])) == 0


def test_decoding_draws_no_global_random_numbers(codec):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    codec.decode([1, 2, 3])
    assert torch.rand(1) == expected


@pytest.mark.parametrize("code", [-1, 64])
def test_a_code_outside_the_codebook_is_refused(codec, code):
    with pytest.raises(ValueError, match=f"code {code} is outside the codebook of 64"):
        codec.decode([0, code])


def test_a_saved_codec_is_the_same_codec(codec, tmp_path):
    codec.save_pretrained(tmp_path)
    loaded = get_audio_tokenizer("mel_vq", tmp_path)
    assert loaded.fingerprint == codec.fingerprint
    assert loaded.config == codec.config
    waveform = (warble(2.0, 30), RATE)
    assert loaded.encode(waveform) == codec.encode(waveform)
    assert torch.equal(loaded.decode([1, 2, 3]), codec.decode([1, 2, 3]))


def test_fitting_is_deterministic_and_depends_on_its_seed():
    clips = [(warble(2.0, seed), RATE) for seed in range(6)]
    config = MelVQConfig(codebook_size=16)
    first = MelVQTokenizer.fit(clips, config, epochs=2).fingerprint
    assert MelVQTokenizer.fit(clips, config, epochs=2).fingerprint == first
    assert MelVQTokenizer.fit(clips, config, epochs=2, seed=1).fingerprint != first


def test_fitting_reports_its_epochs_and_refuses_too_little_audio():
    epochs = []
    clips = [(warble(2.0, seed), RATE) for seed in range(3)]
    MelVQTokenizer.fit(clips, MelVQConfig(codebook_size=16), epochs=3, on_epoch=epochs.append)
    assert epochs == [1, 2, 3]
    with pytest.raises(ValueError, match="75 patches of speech are too few for 512 codes"):
        MelVQTokenizer.fit(clips)


def test_a_folder_without_a_codec_is_refused_in_one_line(codec, tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json there"):
        MelVQTokenizer.from_pretrained(tmp_path)
    codec.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"wings": 2}))
    with pytest.raises(ValueError, match="wings"):
        MelVQTokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a mel_vq codec"):
        MelVQTokenizer.from_pretrained(tmp_path)


def test_a_missing_clip_is_an_audio_error(codec, tmp_path):
    with pytest.raises(AudioError, match="no such audio file"):
        codec.encode(tmp_path / "nothing.wav")


def test_griffin_lim_returns_the_waveform_length_and_a_steady_tone():
    tone = torch.sin(2 * math.pi * 440 * torch.arange(16_000) / RATE)
    magnitudes = stft(tone, 640, 160).abs()
    rebuilt = GriffinLim(640, 160, block=32, lookahead=8).push(magnitudes, last=True)
    assert rebuilt.shape == tone.shape
    # A seam between blocks would show as a dip or a click in the loudness.
    loudness = rebuilt[1600:-1600].unfold(0, 320, 160).square().mean(1).sqrt()
    assert loudness.min() > 0.5 * 2**-0.5
    assert loudness.max() < 1.3 * 2**-0.5
