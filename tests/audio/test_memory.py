"""Clips in memory as other libraries give them: used where they are unambiguous, refused where they are not."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio import AudioError, audio_duration, load_audio, save_audio

RATE = 16_000
STEREO = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2)).astype(np.float32)  # as soundfile orders it
LEFT = torch.from_numpy(STEREO[:, 0].copy())


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "clip.wav"
    soundfile.write(path, STEREO, RATE, subtype="FLOAT")
    return path


def left(audio) -> torch.Tensor:
    waveform, rate = load_audio(audio, channels="first")
    assert rate == RATE
    assert waveform.dtype == torch.float32
    assert audio_duration(audio) == len(waveform) / RATE
    return waveform


def reason(audio) -> str:
    with pytest.raises(AudioError) as caught:
        load_audio(audio)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_samples_by_channels_and_channels_by_samples_are_distinguished(path):
    for array in (soundfile.read(path)[0], STEREO, STEREO.T, torch.from_numpy(STEREO), STEREO.T.tolist()):
        torch.testing.assert_close(left((array, RATE)), LEFT, atol=1e-7, rtol=0)
    assert torch.equal(load_audio((STEREO, RATE))[0], torch.from_numpy(STEREO.T.copy()).mean(0))
    assert torch.equal(left((STEREO[:, :1], RATE)), LEFT)


@pytest.mark.parametrize("shape", [(6, 3), (33, 33), (100, 200), (40, 1000), (2, 10, 1), ()])
def test_an_ambiguous_shape_is_refused(shape):
    assert reason((np.zeros(shape, np.float32), RATE)) == "shape"


def test_rate_and_samples_may_come_in_either_order_as_from_gradio():
    integers = (STEREO * 32767).astype(np.int16)
    for audio in ((RATE, integers), (integers, RATE), (np.int64(RATE), integers), (integers, float(RATE))):
        torch.testing.assert_close(left(audio), LEFT, atol=1e-4, rtol=0)
    torch.testing.assert_close(left((RATE, integers[:, 0])), LEFT, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "zero", "scale"),
    [
        ("int8", 0, 2**7),
        ("int16", 0, 2**15),
        ("int32", 0, 2**31),
        ("uint8", 2**7, 2**7),
        ("uint16", 2**15, 2**15),
    ],
)
def test_integers_are_scaled_by_the_range_of_their_type(dtype, zero, scale):
    values = np.array([-1.0, -0.5, 0.0, 0.25, 0.5])
    integers = (values * scale + zero).astype(dtype)
    for array in (integers, integers.astype(integers.dtype.newbyteorder(">")), torch.from_numpy(integers)):
        assert load_audio((array, RATE))[0].tolist() == values.tolist()


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64", "bool", "complex64", "object", "U4"])
def test_types_of_unknown_scale_are_refused(dtype):
    assert reason((np.ones(50).astype(dtype), RATE)) == "dtype"


def test_integers_stored_in_a_wider_type_are_refused():
    assert reason((np.arange(-500, 500, dtype=np.int32), RATE)) == "range"
    assert load_audio((np.zeros(10, np.int32), RATE))[0].tolist() == [0.0] * 10


@pytest.mark.parametrize("scale", [5, 300, 32767])
def test_unscaled_integers_in_floats_are_refused(tmp_path, scale):
    unscaled = np.round(STEREO[:, 0] * scale / 0.5)
    assert reason((unscaled, RATE)) == "range"
    soundfile.write(tmp_path / "unscaled.wav", unscaled, RATE, subtype="FLOAT")
    assert reason(tmp_path / "unscaled.wav") == "range"


def test_floats_a_little_over_full_scale_are_kept():
    loud = STEREO[:, 0] * 5
    torch.testing.assert_close(load_audio((loud, RATE))[0], torch.from_numpy(loud))


def test_layout_and_byte_order_of_an_array_do_not_matter():
    samples = STEREO[:, 0]
    reading_only = samples.copy()
    reading_only.flags.writeable = False
    for array in (
        samples[::-1][::-1],
        samples.astype(">f4"),
        samples.astype("<f8"),
        np.asfortranarray(STEREO),
        reading_only,
        LEFT.clone().requires_grad_(),
    ):
        torch.testing.assert_close(left((array, RATE)), LEFT, atol=1e-7, rtol=0)
    assert torch.equal(left((samples[::-1], RATE)), LEFT.flip(0))


def test_the_array_of_a_caller_is_never_changed_or_shared():
    samples = STEREO[:, 0].copy()
    waveform, _ = load_audio((samples, RATE))
    waveform.zero_()
    assert (samples == STEREO[:, 0]).all()


def test_encoded_bytes_and_file_objects_are_read(path):
    content = path.read_bytes()
    for audio in (content, bytearray(content), io.BytesIO(content)):
        assert torch.equal(left(audio), LEFT)
    with path.open("rb") as file:
        assert torch.equal(left(file), LEFT)
        assert torch.equal(left(file), LEFT), "reading leaves the position where it was"


def test_file_objects_that_cannot_be_read_are_refused(path, tmp_path):
    spent = io.BytesIO(path.read_bytes())
    spent.read()
    assert reason(spent) == "empty"
    assert reason(io.BytesIO()) == reason(b"") == "empty"
    assert reason(b"not audio at all, only text") == "unreadable"
    with path.open(encoding="latin-1") as text:
        assert reason(text) == "unreadable"
    with (tmp_path / "new.wav").open("wb") as written:
        assert reason(written) == "unreadable"


def test_dictionaries_of_datasets_and_transformers_are_read(path):
    content = path.read_bytes()
    for audio in (
        {"array": STEREO[:, 0], "sampling_rate": RATE, "path": "elsewhere.wav"},
        {"array": STEREO[:, 0].tolist(), "sampling_rate": RATE},
        {"raw": STEREO[:, 0], "sampling_rate": RATE},
        {"path": str(path), "bytes": None},
        {"path": "name_in_a_table.wav", "bytes": content},
        {"path": None, "bytes": content},
    ):
        assert torch.equal(left(audio), LEFT)


def test_incomplete_dictionaries_are_refused(tmp_path):
    assert reason({"array": STEREO[:, 0]}) == "rate"
    assert reason({"path": None, "bytes": None}) == "shape"
    assert reason({}) == "shape"
    assert reason({"path": str(tmp_path / "gone.wav"), "bytes": None}) == "missing"


def test_decoders_of_torchcodec_are_read():
    """``datasets`` returns them for an audio column."""
    samples = SimpleNamespace(data=torch.from_numpy(STEREO.T.copy()), sample_rate=RATE)
    assert torch.equal(left(SimpleNamespace(get_all_samples=lambda: samples)), LEFT)


@pytest.mark.parametrize(
    "audio",
    [
        None,
        7,
        3.5,
        STEREO,
        torch.zeros(5),
        (RATE, RATE),
        (STEREO, STEREO),
        (STEREO,),
        (STEREO, RATE, 1),
        object(),
    ],
    ids=lambda audio: re.sub("0x[0-9a-f]+", "", str(audio)),
)
def test_anything_else_is_refused_with_the_forms_that_are_read(audio):
    assert reason(audio) == "shape"


@pytest.mark.parametrize("rate", [0, -1, 0.5, float("nan"), float("inf")])
def test_rates_that_are_not_positive_whole_numbers_are_refused(rate):
    assert reason((STEREO, rate)) == "rate"


@pytest.mark.parametrize("rate", ["16000", True, None])
def test_rates_that_are_not_numbers_are_refused(rate):
    assert reason((STEREO, rate)) == "shape"


@pytest.mark.parametrize(
    ("bad", "expected"), [(float("nan"), "nan"), (float("inf"), "nan"), (3000.0, "range")]
)
def test_an_invalid_waveform_is_not_saved(tmp_path, bad, expected):
    waveform = LEFT.clone()
    waveform[5] = bad
    with pytest.raises(AudioError, match=r"clip\.wav: not written") as caught:
        save_audio(tmp_path / "clip.wav", waveform, RATE)
    assert caught.value.reason == expected
    with pytest.raises(AudioError, match="int16"):
        save_audio(tmp_path / "clip.wav", torch.ones(10, dtype=torch.int16), RATE)
    assert not (tmp_path / "clip.wav").exists()


class _Failing:
    """A decoder, or an array, whose library fails when it is asked."""

    def get_all_samples(self):
        raise RuntimeError("no packet\nstack\nstack")


@pytest.mark.parametrize(
    "audio",
    [
        _Failing(),
        {"bytes": "text"},
        {"bytes": 5},
        (torch.zeros(9).to_sparse(), 16_000),
        (torch.zeros(9, device="meta"), 16_000),
        (torch.nested.nested_tensor([torch.zeros(9)]), 16_000),
        (np.ma.array(np.zeros(9), mask=[True] + 8 * [False]), 16_000),
        (np.array([-(2**22) + 1, 2**22 + 1], dtype=np.int32), 16_000),
    ],
    ids=lambda audio: re.sub("0x[0-9a-f]+", "", str(audio)),
)
def test_unreadable_input_is_refused_in_one_line(audio):
    with pytest.raises(AudioError) as refusal:
        load_audio(audio)
    assert "\n" not in str(refusal.value)


def test_a_path_in_bytes_of_a_path_object_and_a_long_double_are_read(tmp_path):
    class Place(os.PathLike):
        def __fspath__(self):
            return os.fsencode(tmp_path / "a.wav")

    tone = 0.3 * np.sin(np.arange(800) / 10)
    save_audio(tmp_path / "a.wav", torch.from_numpy(tone), 16_000)
    for audio in (Place(), (tone.astype(np.longdouble), 16_000)):
        assert torch.allclose(load_audio(audio)[0], torch.from_numpy(tone).float(), atol=1e-4)


@pytest.mark.parametrize(
    ("waveform", "rate"),
    [
        (torch.tensor(0.5), 16_000),
        (torch.zeros(1, 1, 5), 16_000),
        (torch.zeros(800, 2), 16_000),
        (np.zeros(5), 16_000),
        ([0.0], 16_000),
        (torch.zeros(5), 10**12),
        (torch.zeros(5), 0),
        (torch.zeros(5), None),
    ],
    ids=str,
)
def test_invalid_samples_are_not_written(waveform, rate, tmp_path):
    with pytest.raises(AudioError, match="not written"):
        save_audio(tmp_path / "a.wav", waveform, rate)
    assert not list(tmp_path.iterdir())
