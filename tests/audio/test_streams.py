"""Speech that arrives in pieces: the same codes, features and samples as the whole clip."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio import AudioError, AudioTokenizer, get_audio_tokenizer
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.audio.resampling import StreamResampler, resample
from vita_audio.audio.sensevoice import Frontend, SenseVoiceInputTokenizer

GOLDENS = Path(__file__).parents[1] / "goldens"
RATE = 16_000


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    """Noise with pauses, loudest at its beginning."""
    generator = torch.Generator().manual_seed(seed)
    envelope = torch.rand(samples // 400 + 1, generator=generator).repeat_interleave(400)[:samples]
    envelope[:800] = 4
    return 0.1 * envelope * torch.randn(samples, generator=generator)


def pieces(waveform: torch.Tensor, cuts: list[float]) -> list[tuple[torch.Tensor, bool]]:
    """The waveform cut at fractions of its length, and whether each piece is the last."""
    edges = [0, *sorted(int(cut * len(waveform)) for cut in cuts), len(waveform)]
    parts = [waveform[a:b] for a, b in itertools.pairwise(edges)]
    return [(part, index == len(parts) - 1) for index, part in enumerate(parts)]


CUTS = st.lists(st.floats(0, 1), max_size=8)
LENGTHS = st.one_of(st.integers(1, 1500), st.integers(1, 40_000))


@pytest.fixture(scope="module")
def glm4voice() -> AudioTokenizer:
    return get_audio_tokenizer("glm4voice", GOLDENS / "glm4voice" / "tokenizer_block20")


@pytest.fixture(scope="module")
def mel_vq() -> MelVQTokenizer:
    clips = [(noise(32_000, seed), RATE) for seed in range(4)]
    return MelVQTokenizer.fit(clips, MelVQConfig(codebook_size=16), epochs=1)


@pytest.fixture(scope="module", params=["glm4voice", "mel_vq", "sensevoice_mel_vq"])
def codec(request, mel_vq) -> AudioTokenizer:
    if request.param == "sensevoice_mel_vq":
        return SenseVoiceInputTokenizer(mel_vq, GOLDENS / "sensevoice")
    return request.getfixturevalue(request.param)


def listen(stream, waveform: torch.Tensor, cuts: list[float]) -> list[int]:
    return [code for piece, last in pieces(waveform, cuts) for code in stream.push(piece, last)]


@given(cuts=CUTS, length=st.integers(1, 60_000))
@settings(max_examples=15, deadline=None)
def test_streamed_codes_equal_offline_codes_for_any_split(codec, cuts, length):
    clip = noise(length)
    assert listen(codec.encode_stream(), clip, cuts) == codec.encode((clip, RATE))


@given(cuts=CUTS, rate=st.sampled_from([8000, 22_050, 24_000, 48_000]))
@settings(max_examples=8, deadline=None)
def test_pieces_may_have_the_rate_of_the_microphone(codec, cuts, rate):
    clip = noise(2 * rate)
    assert listen(codec.encode_stream(rate), clip, cuts) == codec.encode((clip, rate))


def test_an_encode_stream_resets_after_its_end(codec):
    clip, stream = noise(20_000), codec.encode_stream()
    first, second = (listen(stream, clip, [0.3]) for _ in range(2))
    assert first == second == codec.encode((clip, RATE))
    assert stream.push(clip[:0], last=True) == []


def test_encode_streams_do_not_share_state(codec):
    clips = [noise(30_000, seed) for seed in (1, 2)]
    streams = [codec.encode_stream() for _ in clips]
    codes: list[list[int]] = [[], []]
    for start in range(0, 30_000, 6000):
        for heard, stream, clip in zip(codes, streams, clips, strict=True):
            heard += stream.push(clip[start : start + 6000], start == 24_000)
    assert codes == [codec.encode((clip, RATE)) for clip in clips]


def test_codes_of_a_neural_codec_arrive_during_speech(glm4voice):
    stream = glm4voice.encode_stream()
    assert stream.push(noise(20_000))


def test_pieces_of_other_libraries_are_accepted_and_bad_ones_change_nothing(codec):
    clip, stream = noise(20_000), codec.encode_stream()
    integers = (clip * 32768).round().clamp(-32768, 32767).to(torch.int16)
    stream.push(integers[:9000].numpy())
    for bad, reason in (
        (torch.full((5,), float("nan")), "nan"),
        (torch.zeros(2, 5), "shape"),
        (np.arange(9), "dtype"),
        (1000 * torch.ones(5), "range"),
    ):
        with pytest.raises(AudioError) as caught:
            stream.push(bad, last=True)
        assert caught.value.reason == reason
    assert len(stream.push(integers[9000:], last=True)) > 0
    whole = codec.encode_stream().push(integers, last=True)
    assert whole == codec.encode((integers, RATE))


@given(cuts=CUTS, length=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_streamed_features_equal_those_of_the_whole_clip(cuts, length):
    frontend = Frontend(GOLDENS / "sensevoice")
    clip, stream = noise(length), frontend.stream()
    for _ in range(2):  # a stream starts over after its end
        frames = torch.cat([stream.push(piece, last) for piece, last in pieces(clip, cuts)])
        assert torch.equal(frames, frontend((clip, RATE)))


def test_features_arrive_during_speech(mel_vq):
    codec = SenseVoiceInputTokenizer(mel_vq, GOLDENS / "sensevoice")
    clip = noise(24_000)
    stream = codec.feature_stream(24_000)
    heard = stream.push(clip[:12_000])
    assert len(heard) == 8  # of 0.5 s; the ninth frame stacks windows up to 0.535 s
    whole = torch.cat([heard, stream.push(clip[12_000:], last=True)])
    assert torch.equal(whole, codec.features((clip, 24_000)))
    assert stream.push(clip[:0], last=True).shape == (0, 560)
    with pytest.raises(NotImplementedError, match="no continuous features"):
        mel_vq.feature_stream()


@given(
    cuts=CUTS,
    length=st.integers(1, 5000),
    rates=st.tuples(
        st.sampled_from([8000, 16_000, 44_100, 12_345]), st.sampled_from([16_000, 24_000, 22_050])
    ),
)
@settings(max_examples=40, deadline=None)
def test_a_resampled_stream_equals_the_resampled_clip(cuts, length, rates):
    clip, stream = noise(length), StreamResampler(*rates)
    for _ in range(2):
        heard = torch.cat([stream.push(piece, last) for piece, last in pieces(clip, cuts)])
        assert torch.equal(heard, resample(clip, *rates))


def test_several_streams_decode_as_each_does_alone(mel_vq):
    for codec in (mel_vq, SenseVoiceInputTokenizer(mel_vq, GOLDENS / "sensevoice")):
        replies = [[1, 2, 3] * 4, [7] * 9, []]
        streams = [codec.stream() for _ in replies]
        halves = [codec.push_many(streams, [reply[:5] for reply in replies], [False] * 3)]
        halves.append(codec.push_many(streams, [reply[5:] for reply in replies], [True] * 3))
        for reply, parts in zip(replies, zip(*halves, strict=True), strict=True):
            assert torch.equal(torch.cat(parts), codec.decode(reply))


def test_a_refused_push_leaves_every_stream_as_it_was(mel_vq):
    streams = [mel_vq.stream(), mel_vq.stream()]
    with pytest.raises(ValueError, match=r"code 16 at position 1 is outside \[0, 16\)"):
        mel_vq.push_many(streams, [[1, 2], [3, 16]], [False, False])
    for wave in mel_vq.push_many(streams, [[5], [5]], [True, True]):
        assert torch.equal(wave, mel_vq.decode([5]))
    with pytest.raises(ValueError, match="zip"):
        mel_vq.push_many(streams, [[1]], [True])
