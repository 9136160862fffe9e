"""The codec behind the project's interface."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from vita_audio.audio import AudioError, get_audio_tokenizer
from vita_audio.audio.glm4voice import GLM4VoiceTokenizer
from vita_audio.audio.glm4voice.weights import WeightsError

GOLDENS = Path(__file__).parents[1] / "goldens" / "glm4voice"
ENCODER = GOLDENS / "tokenizer_block200"
EXPECTED = json.loads((ENCODER / "expected.json").read_text())["wavs"]


@pytest.fixture
def codec() -> GLM4VoiceTokenizer:
    return get_audio_tokenizer("glm4voice", ENCODER, flow_path=GOLDENS / "decoder")


class _Clips(Dataset):
    def __init__(self, codec: GLM4VoiceTokenizer, names: list[str]):
        self.codec, self.names = codec, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> list[int]:
        return self.codec.encode(GOLDENS / "audio" / self.names[index])


def test_files_encode_to_the_recorded_codes(codec):
    names = list(EXPECTED)
    assert codec.encode_batch([GOLDENS / "audio" / name for name in names]) == [
        EXPECTED[name]["tokens"] for name in names
    ]


def test_a_clip_in_memory_is_encoded_from_its_first_channel(codec):
    clip = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert codec.encode((clip, 16000)) == codec.encode((clip[0], 16000))
    assert len(codec.encode((clip, 16000))) == 13


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.slow
def test_loader_workers_encode_as_the_main_process_does(codec, context):
    names = list(EXPECTED)[:3]
    loader = DataLoader(_Clips(codec, names), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert list(loader) == [EXPECTED[name]["tokens"] for name in names]
    assert not codec._parts


def test_threads_share_one_lazily_loaded_encoder(codec):
    name = next(iter(EXPECTED))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(codec.encode, [GOLDENS / "audio" / name] * 4))
    assert results == [EXPECTED[name]["tokens"]] * 4


def test_opening_a_codec_loads_nothing_and_pickling_takes_no_weights(codec):
    assert not codec._parts
    _ = codec.encoder
    assert codec._parts
    pickled = pickle.dumps(codec)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    assert not copy._parts
    assert copy.fingerprint == codec.fingerprint


def test_the_codec_states_its_rates_and_sizes(codec):
    assert (codec.kind, codec.sample_rate, codec.frame_rate) == ("glm4voice", 22050, 12.5)
    assert codec.codebook_size == 256
    assert not codec.continuous_input


def test_fingerprints_tell_weights_apart(codec):
    other = GLM4VoiceTokenizer.from_pretrained(GOLDENS / "tokenizer_block20")
    assert codec.fingerprint != other.fingerprint
    assert codec.fingerprint.startswith("glm4voice-")


def test_decoding_is_repeatable_in_range_and_of_the_right_length(codec):
    codes = [3, 1, 4, 1, 5, 9, 2, 6]
    wave = codec.decode(codes, steps=2)
    assert wave.shape == (codec.flow.frames(8) * 256,)
    assert wave.dtype == torch.float32
    assert float(wave.abs().max()) <= 0.99 + 1e-6
    assert torch.equal(wave, codec.decode(codes, steps=2))
    assert codec.decode([]).shape == (0,)
    assert not wave.requires_grad


def test_decoding_leaves_the_global_generator_alone(codec):
    before = torch.get_rng_state()
    codec.decode([1, 2, 3], steps=1)
    codec.stream().push(list(range(20)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_missing_folder_or_direction_is_named(tmp_path):
    with pytest.raises(WeightsError, match="folder"):
        get_audio_tokenizer("glm4voice", None)
    with pytest.raises(WeightsError, match="no such folder"):
        get_audio_tokenizer("glm4voice", tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="flow_path"):
        get_audio_tokenizer("glm4voice", ENCODER).decode([1])


def test_bad_audio_and_bad_codes_are_refused(codec):
    with pytest.raises(AudioError, match=r"gone\.wav"):
        codec.encode("gone.wav")
    with pytest.raises(ValueError, match="outside"):
        codec.decode([0, -1])
