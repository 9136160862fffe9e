"""Reading, resampling and refusing audio."""

from __future__ import annotations

import math
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio.io import AudioError, audio_duration, load_audio, resample, save_audio

GOLDENS = Path(__file__).parents[1] / "goldens" / "glm4voice" / "audio"
RESAMPLED = np.load(GOLDENS / "resampled_16k.npz")


@pytest.mark.parametrize("name", ["b_22k_mono.wav", "c_44k_stereo.flac"])
def test_resampling_equals_the_recorded_windowed_sinc(name):
    waveform, rate = load_audio(GOLDENS / name, 16000, channels="first")
    expected = RESAMPLED[name.split(".")[0]]
    assert rate == 16000
    assert waveform.shape == expected.shape
    np.testing.assert_allclose(waveform.numpy(), expected, atol=1e-6, rtol=0)


def test_channels_are_averaged_or_the_first_is_kept():
    stereo = torch.stack([torch.ones(8), torch.zeros(8)])
    assert load_audio((stereo, 16000))[0].tolist() == [0.5] * 8
    assert load_audio((stereo, 16000), channels="first")[0].tolist() == [1.0] * 8


def test_choosing_the_channel_before_resampling_changes_nothing():
    path = GOLDENS / "c_44k_stereo.flac"
    samples, rate = soundfile.read(path, dtype="float32")
    both = resample(torch.from_numpy(samples.T.copy()), rate, 16000)
    torch.testing.assert_close(load_audio(path, 16000, "first")[0], both[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(load_audio(path, 16000, "mean")[0], both.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("wav", {"subtype": "PCM_U8"}),
        ("wav", {"subtype": "PCM_24"}),
        ("wav", {"subtype": "FLOAT"}),
        ("flac", {}),
        ("ogg", {}),
        ("ogg", {"format": "OGG", "subtype": "OPUS"}),
        ("mp3", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 6])
def test_common_formats_load_at_any_rate_and_channel_count(tmp_path, suffix, options, channels):
    rate = 48000 if suffix in ("ogg", "mp3") else 96000
    if suffix in ("ogg", "mp3"):
        channels = min(channels, 2)  # with more, lossy formats filter the bass channel
    time = np.arange(rate // 2) / rate
    tone = np.repeat(0.5 * np.sin(2 * np.pi * 440 * time)[:, None], channels, axis=1)
    path = tmp_path / f"clip.{suffix}"
    soundfile.write(path, tone, rate, **options)
    assert audio_duration(path) == pytest.approx(0.5, abs=0.06)
    waveform, loaded_rate = load_audio(path, 16000)
    assert loaded_rate == 16000
    assert waveform.dtype == torch.float32
    assert len(waveform) == pytest.approx(8000, abs=1000)
    middle = waveform[2000:6000]
    assert float(middle.abs().max()) == pytest.approx(0.5, abs=0.05)
    peak = torch.fft.rfft(middle).abs().argmax() * 16000 / 4000
    assert float(peak) == pytest.approx(440, abs=4)


def _refusal(audio) -> AudioError:
    with pytest.raises(AudioError) as caught:
        load_audio(audio, 16000)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_missing_file_is_refused_by_name(tmp_path):
    error = _refusal(tmp_path / "gone.wav")
    assert error.reason == "missing"
    assert "gone.wav" in str(error)


def test_empty_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("this is not audio")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    assert _refusal(tmp_path / "empty.wav").reason == "empty"
    assert _refusal(tmp_path / "none.wav").reason == "empty"
    assert _refusal(tmp_path / "text.wav").reason == "unreadable"
    with pytest.raises(AudioError, match=r"text\.wav"):
        audio_duration(tmp_path / "text.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_file_cut_in_half_is_refused_as_truncated(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).standard_normal(32000) * 0.1
    soundfile.write(path, noise, 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert _refusal(path).reason == "truncated"


def test_a_wav_of_unknown_length_from_a_pipe_is_read(tmp_path):
    path = tmp_path / "piped.wav"
    soundfile.write(path, np.full(1000, 0.25), 16000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(load_audio(path)[0]) == 1000


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, bad):
    samples = np.zeros(100, dtype=np.float32)
    samples[50] = bad
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    assert _refusal(path).reason == "nan"
    assert _refusal((torch.from_numpy(samples), 16000)).reason == "nan"


def test_a_clip_in_memory_of_wrong_type_shape_or_rate_is_refused():
    assert _refusal((torch.zeros(10, dtype=torch.int64), 16000)).reason == "dtype"
    assert _refusal((torch.zeros(1, 1, 10), 16000)).reason == "shape"
    assert _refusal((torch.zeros(10), 0)).reason == "rate"
    assert _refusal(torch.zeros(10)).reason == "shape"


def test_an_error_keeps_its_reason_when_it_crosses_processes():
    error = pickle.loads(pickle.dumps(AudioError("a.wav: gone", "missing")))
    assert (str(error), error.reason) == ("a.wav: gone", "missing")


def test_saved_audio_reads_back(tmp_path):
    waveform = torch.linspace(-1, 1, 500)
    save_audio(tmp_path / "new" / "clip.wav", waveform, 22050)
    loaded, rate = load_audio(tmp_path / "new" / "clip.wav")
    assert rate == 22050
    torch.testing.assert_close(loaded, waveform, atol=1e-4, rtol=0)


@given(
    samples=st.integers(1, 400),
    rates=st.tuples(st.sampled_from([8000, 11025, 16000, 22050, 44100, 12345]), st.integers(4000, 50000)),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_resampling_equals_the_dense_convolution_of_the_specification(samples, rates, seed):
    old_rate, new_rate = rates
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(seed))
    result = resample(waveform, old_rate, new_rate)
    divisor = math.gcd(*rates)
    old, new = old_rate // divisor, new_rate // divisor
    length = math.ceil(np.float32(new * samples / old))
    assert result.shape == (samples if old == new else length,)
    if old != new:
        output = seed % length
        expected = _one_output(waveform.numpy(), old, new, output)
        assert float(result[output]) == pytest.approx(expected, abs=1e-5)


def _one_output(waveform: np.ndarray, old: int, new: int, output: int) -> float:
    """One sample of section 1.1, written out."""
    cutoff = 0.99 * min(old, new)
    width = math.ceil(6 * old / cutoff)
    step, phase = divmod(output, new)
    total = 0.0
    for tap in range(-width, width + old):
        index = step * old + tap
        if 0 <= index < len(waveform):
            t = min(6.0, max(-6.0, cutoff * (tap / old - float(np.float32(phase / new)))))
            weight = cutoff / old * np.sinc(t) * math.cos(math.pi * t / 12) ** 2
            total += float(np.float32(weight)) * float(waveform[index])
    return total


def test_a_full_disk_leaves_no_partial_file_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "a.wav"
    save_audio(path, torch.zeros(800), 16_000)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(AudioError, match=r"a\.wav: cannot be written: [^\n]+$"):
            save_audio(path, torch.zeros(16_000), 16_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]
    assert path.read_bytes() == before
