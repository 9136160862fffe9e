"""The GLM-4-Voice tokenizer network against the recorded numbers, and its guarantees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vita_audio.audio.glm4voice import VQEncoder
from vita_audio.audio.glm4voice.vq_encoder import SEGMENT_SAMPLES, _block_causal_mask, released_config
from vita_audio.audio.glm4voice.weights import WeightsError
from vita_audio.audio.io import load_audio

GOLDENS = Path(__file__).parents[1] / "goldens" / "glm4voice"
CLIPS = ("a_16k_mono.flac", "b_22k_mono.wav", "c_44k_stereo.flac", "d_16k_33s.flac")
FEATURES = np.load(GOLDENS / "audio" / "features_expected.npz")


@pytest.fixture(scope="module", params=["tokenizer_block200", "tokenizer_block20"])
def folder(request) -> Path:
    return GOLDENS / request.param


@pytest.fixture(scope="module")
def encoder(folder) -> VQEncoder:
    return VQEncoder.from_pretrained(folder)


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    resampled = np.load(GOLDENS / "audio" / "resampled_16k.npz")
    return {
        name: torch.from_numpy(resampled[name.split(".")[0]])
        if name.split(".")[0] in resampled
        else load_audio(GOLDENS / "audio" / name, 16000, channels="first")[0]
        for name in CLIPS
    }


@pytest.fixture
def expected(folder) -> dict:
    return json.loads((folder / "expected.json").read_text())


def _close(actual: torch.Tensor, expected: np.ndarray, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(actual.numpy(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
def test_codes_equal_the_recorded_ones(encoder, clips, expected, clip):
    assert encoder.encode([clips[clip]]) == [expected["wavs"][clip]["tokens"]]


@pytest.mark.parametrize("clip", CLIPS)
def test_codes_from_the_file_itself_equal_the_recorded_ones(encoder, expected, clip):
    waveform, _ = load_audio(GOLDENS / "audio" / clip, 16000, channels="first")
    assert encoder.encode([waveform]) == [expected["wavs"][clip]["tokens"]]


def test_codes_of_a_batch_equal_the_recorded_batch_and_those_one_by_one(encoder, clips, expected):
    order = expected["batched_call"]["order"]
    together = encoder.encode([clips[name] for name in order])
    assert together == expected["batched_call"]["tokens"]
    assert together == [encoder.encode([clips[name]])[0] for name in order]


@pytest.mark.parametrize("clip", CLIPS)
def test_features_equal_the_recorded_ones(encoder, clips, clip):
    name = clip.split(".")[0]
    features, mask = encoder.features([clips[clip]])
    _close(features.mean(2), FEATURES[f"{name}/mel_mean"])
    _close(features.std(2), FEATURES[f"{name}/mel_std"])
    _close(features.amin(2), FEATURES[f"{name}/mel_min"])
    _close(features.amax(2), FEATURES[f"{name}/mel_max"])
    _close(features[:, :, ::50], FEATURES[f"{name}/frames_sub"])
    _close(mask.sum(1), FEATURES[f"{name}/attention_mask_sum"])
    if f"{name}/input_features" in FEATURES:
        _close(features, FEATURES[f"{name}/input_features"])


@pytest.mark.parametrize("clip", CLIPS)
def test_states_equal_the_recorded_ones(encoder, folder, clips, clip):
    recorded, name = np.load(folder / "expected.npz"), clip.split(".")[0]
    features, mask = encoder.features([clips[clip]])
    prequant = encoder.prequant(features, mask).flatten(0, 1)
    kept = recorded[f"{name}/prequant"]
    _close(prequant[: len(kept)], kept)
    if f"{name}/last_hidden_state" in recorded:
        states = encoder.hidden_states(features, mask)
        _close(states[0], recorded[f"{name}/hidden_before_layer0"])
        _close(states[1], recorded[f"{name}/hidden_before_layer1"])
        _close(encoder.dequantize(encoder(features, mask)), recorded[f"{name}/last_hidden_state"])


def test_states_in_the_recorded_batch_agree(encoder, folder, clips, expected):
    recorded = np.load(folder / "expected.npz")
    order = expected["batched_call"]["order"]
    features, mask = encoder.features([clips[name] for name in order])
    prequant = encoder.prequant(features, mask)
    row = 0
    for name in order:
        row += -(-len(clips[name]) // SEGMENT_SAMPLES)
        kept = -(-((len(clips[name]) - 1) % SEGMENT_SAMPLES + 1) // 1280)
        _close(prequant[row - 1, kept - 1], recorded[f"batched/{name.split('.')[0]}/last_prequant"][0])


def test_codes_do_not_depend_on_the_batch_even_when_speech_touches_the_padding(encoder, clips):
    speech = clips["d_16k_33s.flac"]
    # Ends just before a whole code: the last feature frame then mirrors real samples.
    awkward = speech[10_000 : 10_000 + 20 * 1280 - 50]
    assert encoder.encode([awkward, speech[: 5 * 16000]])[0] == encoder.encode([awkward])[0]


def test_no_samples_give_no_codes_and_one_sample_gives_one(encoder):
    codes = encoder.encode([torch.empty(0), torch.zeros(1), torch.zeros(1281)])
    assert [len(row) for row in codes] == [0, 1, 2]


def test_segments_of_thirty_seconds_are_independent(encoder, clips):
    speech = clips["d_16k_33s.flac"]
    codes = encoder.encode([speech])[0]
    assert codes[375:] == encoder.encode([speech[SEGMENT_SAMPLES:]])[0]


def test_streamed_codes_never_change_and_equal_those_of_the_audio_so_far(encoder, clips):
    speech = clips["d_16k_33s.flac"]
    # The loudest moment comes first, so that the loudness floor is known from the start.
    speech = torch.cat([speech[speech.abs().argmax() - 800 :], speech])[: 31 * 16000]
    stream, heard = encoder.stream(), []
    for start in range(0, len(speech), 7000):
        fresh = stream.push(speech[start : start + 7000], last=start + 7000 >= len(speech))
        heard += fresh
    whole = encoder.encode([speech])[0]
    assert len(heard) == len(whole)
    agreement = np.mean([a == b for a, b in zip(heard, whole, strict=True)])
    assert agreement > 0.98


def test_a_stream_returns_nothing_before_a_block_is_complete(encoder, clips):
    block_samples = encoder.config.quantize_causal_block_size * 320
    speech = clips["d_16k_33s.flac"]
    stream = encoder.stream()
    assert stream.push(speech[:block_samples]) == []
    first = stream.push(speech[block_samples : block_samples + 200])
    assert len(first) == block_samples // 1280
    assert first == encoder.encode([speech[: block_samples + 200]])[0][: len(first)]


def test_a_checkpoint_of_the_whole_model_loads_too(tmp_path, folder, encoder, clips):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    prefixed = {f"model.encoder.{key}": value for key, value in state.items()}
    extra = f"model.encoder.layers.{config['quantize_position']}.fc1.bias"
    prefixed |= {extra: torch.zeros(3), "model.encoder.layer_norm.weight": torch.zeros(3)}
    prefixed["model.decoder.embed_tokens.weight"] = torch.zeros(3)
    (tmp_path / "model.safetensors").chmod(0o644)
    save_file(prefixed, tmp_path / "model.safetensors")
    clip = clips["a_16k_mono.flac"]
    assert VQEncoder.from_pretrained(tmp_path).encode([clip]) == encoder.encode([clip])


def test_bfloat16_gives_mostly_the_same_codes(encoder, folder, clips):
    speech = clips["d_16k_33s.flac"]
    half = VQEncoder.from_pretrained(folder, dtype=torch.bfloat16).encode([speech])[0]
    full = encoder.encode([speech])[0]
    assert np.mean([a == b for a, b in zip(half, full, strict=True)]) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 64}, "ema_count|ema_weight|conv1"),
        ({"quantize_position": 6, "encoder_layers": 8}, r"layers\.\d"),
        ({"pooling_type": "max"}, "pooling_type"),
        ({"pooling_position": 9}, "pooling_position"),
        ({"quantize_encoder_only": False}, "quantize_encoder_only"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, folder, change, message):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").chmod(0o644)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        VQEncoder.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path, folder):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        VQEncoder.from_pretrained(tmp_path)


def test_an_instance_of_released_sizes_has_the_released_keys_and_shapes():
    manifest = json.loads((GOLDENS / "manifest_tokenizer.json").read_text())["tensors"]
    with torch.device("meta"):
        encoder = VQEncoder(released_config())
    shapes = {key: list(value.shape) for key, value in encoder.state_dict().items()}
    assert shapes == {key: entry["shape"] for key, entry in manifest.items()}


@given(length=st.integers(1, 24), block=st.integers(1, 9), real=st.integers(1, 24))
@settings(max_examples=50, deadline=None)
def test_the_mask_is_the_past_and_the_own_block_of_real_frames(length, block, real):
    keys = (torch.arange(length) < real)[None]
    allowed = _block_causal_mask(keys, block)[0, 0]
    for query in range(length):
        for key in range(length):
            wanted = (key <= query or key // block == query // block) and key < real
            assert bool(allowed[query, key]) == wanted
