"""Frontend: golden features, every kind of clip, and the normalisation file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio import AudioError, AudioTokenizer, get_audio_tokenizer
from vita_audio.audio.sensevoice import Frontend, SenseVoiceInputTokenizer
from vita_audio.audio.sensevoice.frontend import (
    estimate_cmvn,
    filter_bank,
    read_cmvn,
    stack_frames,
    write_cmvn,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"
WAVS = {
    "a": "wav_a_16k_mono.wav",
    "b": "wav_b_44k1_stereo.wav",
    "c": "wav_c_100ms.wav",
    "d": "wav_d_20ms.wav",
}


@pytest.fixture(scope="module")
def golden():
    return {name: torch.from_numpy(value) for name, value in np.load(GOLDENS / "frontend.npz").items()}


@pytest.fixture(scope="module")
def frontend():
    return Frontend(GOLDENS)


@pytest.mark.parametrize("name", WAVS)
def test_each_stage_equals_the_golden(golden, frontend, name):
    fbank = filter_bank(golden[f"{name}_wave"])
    torch.testing.assert_close(fbank, golden[f"{name}_fbank"], atol=2e-3, rtol=0)
    assert torch.equal(stack_frames(golden[f"{name}_fbank"]), golden[f"{name}_lfr"])
    torch.testing.assert_close(
        frontend.normalize(golden[f"{name}_lfr"]), golden[f"{name}_feats"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", WAVS)
def test_a_file_of_any_rate_and_channels_gives_the_golden_features(golden, frontend, name):
    features = frontend(GOLDENS / WAVS[name])
    torch.testing.assert_close(features, golden[f"{name}_feats"], atol=2e-3, rtol=0)
    assert features.dtype == torch.float32


def test_path_waveform_with_rate_and_bare_waveform_agree(frontend):
    path = GOLDENS / WAVS["a"]
    samples, rate = soundfile.read(path, dtype="float32")
    expected = frontend(path)
    assert torch.equal(frontend((torch.from_numpy(samples), rate)), expected)
    assert torch.equal(frontend(torch.from_numpy(samples)), expected)
    assert torch.equal(frontend(samples), expected)


def test_digital_silence_has_the_energy_floor():
    torch.testing.assert_close(filter_bank(torch.zeros(800)), torch.full((3, 80), math.log(1.1920929e-07)))


def test_stacking_takes_the_listed_source_frames():
    table = json.loads((GOLDENS / "frontend_meta.json").read_text())["lfr_source_frame_index_by_num_frames"]
    for count, expected in table.items():
        frames = torch.arange(int(count)).float()[:, None].expand(-1, 80)
        assert stack_frames(frames)[:, ::80].int().tolist() == expected


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 4000))
def test_every_length_gives_one_frame_per_sixty_milliseconds(samples):
    waveform = torch.sin(torch.arange(samples) * 0.3) * 0.1
    features = Frontend(GOLDENS)(waveform)
    windows = max(1, 1 + (samples - 400) // 160)
    assert features.shape == (math.ceil(windows / 6), 560)
    assert torch.isfinite(features).all()


def test_equal_speech_has_equal_features_unless_dither_is_asked_for():
    waveform = torch.zeros(3200)
    plain, noisy = Frontend(GOLDENS), Frontend(GOLDENS, dither=1.0)
    assert torch.equal(plain(waveform), plain(waveform))
    assert (noisy(waveform) - plain(waveform)).abs().max() > 1


def test_audio_without_samples_is_refused(frontend):
    with pytest.raises(AudioError, match="no samples"):
        frontend(torch.zeros(0))


def test_the_normalisation_file_is_read_as_listed(golden):
    shift, scale = read_cmvn(GOLDENS / "am.mvn")
    assert torch.equal(shift, golden["cmvn_add_shift"])
    assert torch.equal(scale, golden["cmvn_rescale"])


def test_a_written_normalisation_file_reads_back(tmp_path):
    shift, scale = torch.randn(560), torch.rand(560) + 0.1
    write_cmvn(tmp_path / "am.mvn", shift, scale)
    read = Frontend(tmp_path)
    torch.testing.assert_close(read.shift, shift, atol=1e-6, rtol=0)
    torch.testing.assert_close(read.scale, scale, atol=1e-6, rtol=0)
    assert read.fingerprint != Frontend(GOLDENS).fingerprint


def test_an_estimated_normalisation_standardises_its_clips(tmp_path):
    clips = [GOLDENS / WAVS["a"], GOLDENS / WAVS["c"], GOLDENS / WAVS["d"]]
    write_cmvn(tmp_path / "am.mvn", *estimate_cmvn(clips))
    features = torch.cat([Frontend(tmp_path)(clip) for clip in clips])
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(560), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(560), atol=1e-3, rtol=0)


def test_a_constant_band_does_not_blow_up_the_estimate():
    _, scale = estimate_cmvn([(torch.zeros(1600), 16000)])
    assert scale.max() <= 1000
    with pytest.raises(ValueError, match="no audio"):
        estimate_cmvn([])


def test_a_folder_without_normalisation_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"am\.mvn"):
        Frontend(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("<Rescale>", "<Other>"), "no <Rescale>"),
        (lambda text: text.replace("[ -8.782711", "["), "holds 559 values"),
        (lambda text: text.replace("-8.782711", "oops"), "not a number"),
    ],
)
def test_a_damaged_normalisation_file_is_refused_by_part(tmp_path, damage, message):
    (tmp_path / "am.mvn").write_text(damage((GOLDENS / "am.mvn").read_text()))
    with pytest.raises(ValueError, match=message):
        Frontend(tmp_path)


class Echo(AudioTokenizer):
    """The smallest discrete codec: remembers what it was asked."""

    kind, sample_rate, codebook_size, fingerprint = "echo", 8000, 7, "echo-1"

    def encode(self, audio):
        return [1, 2, 3]

    def decode(self, tokens, steps=10, generator=None):
        return torch.full((len(tokens),), steps / 10)

    def stream(self, generator=None):
        return "stream"


def test_features_come_from_the_front_end_and_the_rest_from_the_discrete_codec(frontend):
    codec = SenseVoiceInputTokenizer(Echo(), GOLDENS)
    path = GOLDENS / WAVS["c"]
    assert codec.kind == "sensevoice_echo"
    assert codec.continuous_input
    assert torch.equal(codec.features(path), frontend(path))
    assert codec.encode(path) == [1, 2, 3]
    assert codec.encode_batch([path, path]) == [[1, 2, 3]] * 2
    assert codec.decode([0, 0], steps=5).tolist() == [0.5, 0.5]
    assert codec.stream() == "stream"
    assert (codec.sample_rate, codec.codebook_size, codec.fingerprint) == (8000, 7, "echo-1")
    assert codec.feature_fingerprint == frontend.fingerprint


def test_a_continuous_codec_without_front_end_is_refused():
    with pytest.raises(ValueError, match="frontend_path"):
        SenseVoiceInputTokenizer(Echo(), None)


def test_the_noise_of_a_plus_reply_follows_its_generator():
    glm4voice = Path(__file__).parents[1] / "goldens" / "glm4voice" / "decoder"
    plus = get_audio_tokenizer("sensevoice_glm4voice", flow_path=glm4voice, frontend_path=GOLDENS)
    codes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    speak = {
        "decode": lambda codec, generator: codec.decode(codes, 2, generator),
        "stream": lambda codec, generator: codec.stream(generator).push(codes, last=True),
    }
    for name, run in speak.items():
        first, again, other, default = (run(plus, g) for g in (seeded(1), seeded(1), seeded(2), None))
        assert torch.equal(first, again), name
        assert torch.equal(first, run(plus.discrete, seeded(1))), name
        assert not torch.equal(first, other), name
        assert not torch.equal(first, default), name
