"""Files with wrong headers: all of the content is read, or the file is refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio.io import AudioError, audio_duration, load_audio

RATE = 16_000
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 2 * RATE).astype(np.float32)


def encoded(
    format_name: str, subtype: str = "PCM_16", samples: np.ndarray = NOISE, rate: int = RATE
) -> bytes:
    """A file as soundfile writes it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format_name, subtype=subtype)
    return buffer.getvalue()


def constant_mp3(samples: np.ndarray, compression: float, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    options = {"bitrate_mode": "CONSTANT", "compression_level": compression}
    with soundfile.SoundFile(buffer, "w", rate, 1, "MPEG_LAYER_III", format="MP3", **options) as file:
        file.write(samples)
    return buffer.getvalue()


def without_first_frame(mp3: bytes) -> bytes:
    """The frames after the Xing header."""
    return mp3[mp3.index(mp3[:2], 4) :]


def patched(content: bytes, offset: int, value: int, layout: str) -> bytes:
    changed = bytearray(content)
    struct.pack_into(layout, changed, offset, value & ((1 << 8 * struct.calcsize(layout)) - 1))
    return bytes(changed)


def refusal(read: Callable[[bytes], object], content: bytes) -> str:
    """The message, if the content is refused."""
    try:
        read(content)
    except AudioError as error:
        return str(error)
    return ""


# Where a format states the bytes of its samples, and what its size counts beside them.
SIZES = {
    "WAV": (lambda content: content.index(b"data") + 4, "<I", 0),
    "RF64": (lambda content: content.index(b"ds64") + 16, "<Q", 0),
    "W64": (lambda content: content.index(b"data") + 16, "<Q", 24),
    "AIFF": (lambda content: content.index(b"SSND") + 4, ">I", 8),
    "AU": (lambda content: 8, ">I", 0),
    "CAF": (lambda content: content.index(b"data") + 4, ">Q", 4),
}
UNKNOWN = (0, 0x7F000000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFF0)
FORMATS = pytest.mark.parametrize("format_name", SIZES)


def restated(format_name: str, size: int) -> bytes:
    """A file of that format whose header states ``size`` bytes of samples."""
    content = encoded(format_name)
    find, layout, _ = SIZES[format_name]
    return patched(content, find(content), size, layout)


def check_all_is_heard(tmp_path: Path, content: bytes, expected: np.ndarray, atol: float = 1e-4) -> None:
    path = tmp_path / "clip.bin"
    path.write_bytes(content)
    for audio in (path, content):
        waveform, rate = load_audio(audio)
        assert audio_duration(audio) == pytest.approx(len(waveform) / rate, abs=1e-9)
        torch.testing.assert_close(waveform, torch.from_numpy(expected), atol=atol, rtol=0)


@FORMATS
@pytest.mark.parametrize("size", UNKNOWN, ids=hex)
def test_a_recording_of_unknown_length_is_read_to_its_end(tmp_path, format_name, size):
    check_all_is_heard(tmp_path, restated(format_name, size), NOISE)


@pytest.mark.parametrize("format_name", ["RF64", "W64", "CAF"])
@pytest.mark.parametrize("size", [1 << 40, (1 << 63) - 1, (1 << 64) - 1], ids=hex)
def test_an_absurd_64_bit_length_is_ignored(tmp_path, format_name, size):
    check_all_is_heard(tmp_path, restated(format_name, size), NOISE)


@FORMATS
def test_samples_after_the_declared_length_are_read(tmp_path, format_name):
    own = SIZES[format_name][2]
    check_all_is_heard(tmp_path, restated(format_name, 2 * 8000 + own), NOISE)


@FORMATS
def test_a_file_shorter_than_its_header_states_is_refused(tmp_path, format_name):
    for content in (restated(format_name, 70_000), encoded(format_name)[:-20_000]):
        for read in (load_audio, audio_duration):
            with pytest.raises(AudioError, match="cut off") as caught:
                read(content)
            assert caught.value.reason == "truncated"


@FORMATS
def test_all_recordings_of_joined_files_are_read(tmp_path, format_name):
    both = encoded(format_name) + encoded(format_name, samples=NOISE[:5000])
    check_all_is_heard(tmp_path, both, np.concatenate([NOISE, NOISE[:5000]]))


@pytest.mark.parametrize("subtype", ["PCM_16", "ALAC_16"])
@pytest.mark.parametrize("sizes", [(False, False), (True, False), (True, True)])
def test_joined_caf_files_are_read_whole_even_if_compressed_and_of_unknown_length(tmp_path, subtype, sizes):
    both = b""
    for unknown in sizes:
        content = encoded("CAF", subtype)
        both += patched(content, content.index(b"data") + 4, (1 << 64) - 1, ">Q") if unknown else content
    check_all_is_heard(tmp_path, both, np.concatenate([NOISE, NOISE]))


@pytest.mark.parametrize(
    "tail",
    [
        b"LIST\x04\x00\x00\x00abcd",
        b"LIST\x04\x00\x00\x00abcdid3 \x05\x00\x00\x00abcde\x00",
        b"TAG".ljust(128, b"x"),
        b"ID3\x04\x00\x00\x00\x00\x00\x0aabcdefghij",
        b"LIST\xff\x00\x00\x00abcd",
        bytes(512),
    ],
    ids=["list", "two chunks", "ID3v1", "ID3v2", "cut list", "padding"],
)
def test_chunks_after_the_samples_of_a_wav_are_not_read_as_sound(tmp_path, tail):
    check_all_is_heard(tmp_path, encoded("WAV") + tail, NOISE)


def test_an_odd_chunk_without_padding_is_followed_by_others(tmp_path):
    content = encoded("WAV", "PCM_U8", NOISE[:9999])
    content = content[: content.index(b"data") + 8 + 9999]
    check_all_is_heard(tmp_path, content + b"LIST\x04\x00\x00\x00abcd", NOISE[:9999], atol=0.01)


def test_a_wav_without_samples_is_empty_even_if_chunks_follow(tmp_path):
    content = encoded("WAV", samples=NOISE[:0]) + b"LIST\x04\x00\x00\x00abcd"
    with pytest.raises(AudioError) as caught:
        load_audio(content)
    assert caught.value.reason == "empty"


def test_an_au_header_that_points_at_itself_is_refused():
    content = patched(restated("AU", 0), 4, 0, ">I")
    with pytest.raises(AudioError, match="audio bytes"):
        load_audio(content)


def test_headers_without_samples_at_the_start_are_skipped(tmp_path):
    header = encoded("CAF", samples=NOISE[:0])
    check_all_is_heard(tmp_path, header + encoded("CAF"), NOISE)


# --- FLAC -------------------------------------------------------------------------------------------


def flac_stating(content: bytes, samples: int) -> bytes:
    packed = int.from_bytes(content[18:26], "big")
    return content[:18] + (packed >> 36 << 36 | samples).to_bytes(8, "big") + content[26:]


@pytest.mark.parametrize("samples", [0, 8000, (1 << 36) - 1], ids=["unknown", "stale", "all ones"])
@pytest.mark.parametrize("shape", ["mono", "stereo"])
def test_a_flac_is_read_to_its_last_frame(tmp_path, samples, shape):
    sound = NOISE if shape == "mono" else np.stack([NOISE, 0.5 * NOISE], axis=1)
    content = flac_stating(encoded("FLAC", samples=sound), samples)
    check_all_is_heard(tmp_path, content, sound if shape == "mono" else sound.mean(axis=1))


def test_all_recordings_of_joined_flac_files_are_read(tmp_path):
    content = encoded("FLAC")
    check_all_is_heard(tmp_path, content + content, np.concatenate([NOISE, NOISE]))


def test_a_flac_of_a_killed_recorder_is_read_up_to_its_last_complete_frame(tmp_path):
    content = flac_stating(encoded("FLAC"), 0)
    cut = content[: len(content) * 2 // 3]
    heard, _ = load_audio(cut)
    assert 0.6 * len(NOISE) - 4096 < len(heard) < 0.7 * len(NOISE)
    check_all_is_heard(tmp_path, cut, NOISE[: len(heard)])


def test_a_flac_that_states_more_samples_than_it_holds_is_refused():
    with pytest.raises(AudioError, match="cut off, 32000 of 40000 samples"):
        load_audio(flac_stating(encoded("FLAC"), 40_000))


# --- Ogg --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_every_link_of_a_chained_ogg_is_read(tmp_path, subtype):
    first, second = encoded("OGG", subtype), encoded("OGG", subtype, NOISE[:8000])
    expected = np.concatenate([load_audio(part)[0].numpy() for part in (first, second)])
    assert len(expected) == 40_000
    check_all_is_heard(tmp_path, first + second, expected)


def test_links_of_different_rates_and_channels_are_joined_at_the_first_rate():
    stereo = np.stack([NOISE, NOISE], axis=1)
    chained = encoded("OGG", "VORBIS") + encoded("OGG", "OPUS", stereo, 48_000)
    waveform, rate = load_audio(chained)
    assert rate == RATE
    assert len(waveform) == pytest.approx(2 * RATE * (1 + 1 / 3), abs=2)
    assert audio_duration(chained) == pytest.approx(len(waveform) / rate, abs=2 / rate)


# --- MP3 --------------------------------------------------------------------------------------------


def test_a_variable_rate_mp3_without_xing_header_is_read_whole(tmp_path):
    """libsndfile takes the length from the first frame's bit rate and stops at half of it."""
    loud, quiet = constant_mp3(NOISE, 0.0), constant_mp3(0.1 * NOISE, 0.99)
    assert len(loud) > 10 * len(quiet)
    content = without_first_frame(loud) + without_first_frame(quiet)
    believed = soundfile.info(io.BytesIO(content)).duration
    assert believed < 2.5
    waveform, rate = load_audio(content)
    assert len(waveform) / rate == pytest.approx(4.0, abs=0.15)
    assert audio_duration(content) == len(waveform) / rate
    halves = [float(half.square().mean().sqrt()) for half in (waveform[4000:28_000], waveform[-28_000:-4000])]
    assert halves[0] == pytest.approx(float(np.sqrt(np.mean(NOISE**2))), rel=0.2)
    assert halves[1] < 0.15 * halves[0]


def test_all_recordings_of_joined_mp3_files_are_read(tmp_path):
    first, second = constant_mp3(NOISE, 0.5), constant_mp3(NOISE[:9000], 0.2)
    expected = np.concatenate([load_audio(part)[0].numpy() for part in (first, second)])
    assert len(expected) == 41_000
    tag = b"ID3\x04\x00\x00\x00\x00\x01\x00".ljust(138, b"\0")
    check_all_is_heard(tmp_path, tag + first + tag + second + b"TAG".ljust(128, b"\0"), expected)


def test_a_xing_header_that_states_too_few_frames_is_ignored(tmp_path):
    content = constant_mp3(NOISE, 0.5)
    at = next(content.index(name) for name in (b"Xing", b"Info") if name in content[:200])
    check_all_is_heard(tmp_path, patched(content, at + 8, 5, ">I"), load_audio(content)[0].numpy())


@pytest.mark.parametrize(("kept", "refused"), [(0.6, True), (0.85, True), (0.92, True), (0.98, False)])
def test_an_mp3_may_miss_a_twentieth_of_its_frames_and_no_more(kept, refused):
    content = constant_mp3(np.tile(NOISE, 3), 0.5)
    cut = content[: int(kept * len(content))]
    if refused:
        with pytest.raises(AudioError) as caught:
            load_audio(cut)
        assert caught.value.reason == "truncated"
    else:
        waveform, rate = load_audio(cut)
        assert len(waveform) / rate == audio_duration(cut) == pytest.approx(6 * kept, abs=0.2)


def test_an_ordinary_mp3_is_read_as_before(tmp_path):
    content = constant_mp3(NOISE, 0.5)
    check_all_is_heard(tmp_path, content, soundfile.read(io.BytesIO(content), dtype="float32")[0], atol=1e-6)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("format_name", [*SIZES, "FLAC", "OGG", "MP3"])
def test_damage_to_a_header_never_ends_in_a_traceback(monkeypatch, format_name):
    monkeypatch.setattr("audioread.available_backends", list)  # a machine without ffmpeg
    rng = np.random.default_rng(0)
    subtype = {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}.get(format_name, "PCM_16")
    content = encoded(format_name, subtype, NOISE[:4000])
    for _ in range(60):
        damaged = bytearray(content)
        for offset in rng.integers(0, min(len(content), 200), 4):
            damaged[offset] = rng.integers(0, 256)
        for read in (load_audio, audio_duration):
            assert "\n" not in refusal(read, bytes(damaged))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("NIST", "PCM_16"), ("NIST", "ULAW"), ("SVX", "PCM_16"), ("MAT5", "PCM_16"), ("AVR", "PCM_16")],
)
def test_a_rare_format_is_read_whole_or_refused(container, subtype):
    tone = 0.3 * np.sin(np.arange(32_000) / 10)
    file = io.BytesIO()
    soundfile.write(file, tone, 16_000, format=container, subtype=subtype)
    content = file.getvalue()
    if container in ("NIST", "SVX"):
        assert load_audio(content)[0].shape == (32_000,)
    with pytest.raises(AudioError, match="cut off"):
        load_audio(content[: len(content) // 2])


def test_codecs_in_wav_that_cannot_seek_are_read():
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(16_000) / 10), 8000, format="WAV", subtype="GSM610")
    waveform, rate = load_audio(file.getvalue())
    assert (round(len(waveform) / rate, 1), rate) == (2.0, 8000)


@pytest.mark.parametrize("rate", [1, 2_000_000_000])
def test_an_impossible_rate_is_refused_before_it_exhausts_memory(rate):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(16_000), 16_000, format="WAV")
    content = bytearray(file.getvalue())
    content[24:28] = rate.to_bytes(4, "little")
    for read in (lambda audio: load_audio(audio, 16_000), audio_duration):
        with pytest.raises(AudioError, match=f"sample rate of {rate} Hz"):
            read(bytes(content))
    with pytest.raises(AudioError, match="sample rate"):
        load_audio((torch.zeros(16_000), 1000 * rate + 1 if rate > 1 else rate), 16_000)
