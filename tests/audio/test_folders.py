"""Opening a codec: folders are checked at once, by their small files; one direction can be opened alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vita_audio.audio import get_audio_tokenizer
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
TOKENIZER = GOLDENS / "glm4voice" / "tokenizer_block20"
DECODER = GOLDENS / "glm4voice" / "decoder"
SENSEVOICE = GOLDENS / "sensevoice"
CLIP = GOLDENS / "glm4voice" / "audio" / "a_16k_mono.flac"


@pytest.fixture
def mel_vq(tmp_path) -> Path:
    config = MelVQConfig(codebook_size=4)
    bins = config.fft_size // 2 + 1
    codec = MelVQTokenizer(
        config, torch.rand(4, config.patch_frames * config.mels), torch.rand(4, config.patch_frames, bins)
    )
    codec.save_pretrained(tmp_path / "mel_vq")
    return tmp_path / "mel_vq"


def refusal(kind: str, path: Path | None = None, **folders: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        get_audio_tokenizer(kind, path, **folders)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_another_kind_is_refused_by_its_content(mel_vq, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2_mtp"}))
    for kind, path, found in (
        ("glm4voice", mel_vq, "mel_vq codec"),
        ("glm4voice", DECODER, "GLM-4-Voice decoder"),
        ("glm4voice", SENSEVOICE, "SenseVoice model"),
        ("glm4voice", model, "qwen2_mtp model"),
        ("mel_vq", TOKENIZER, "GLM-4-Voice tokenizer"),
        ("mel_vq", model, "qwen2_mtp model"),
        ("sensevoice_glm4voice", mel_vq, "mel_vq codec"),
    ):
        message = refusal(kind, path, frontend_path=SENSEVOICE)
        assert message.startswith(f"{path}: holds a {found}, not a ")
        assert kind.removeprefix("sensevoice_") in message
    assert "holds a GLM-4-Voice tokenizer" in refusal("glm4voice", TOKENIZER, flow_path=TOKENIZER)


@pytest.mark.parametrize("kind", ["glm4voice", "mel_vq", "sensevoice_glm4voice", "sensevoice_mel_vq"])
def test_a_missing_folder_is_refused_with_its_name_and_the_kind(kind, tmp_path):
    message = refusal(kind, tmp_path / "nowhere", frontend_path=SENSEVOICE)
    assert message.startswith(f"{tmp_path / 'nowhere'}: no such folder")
    assert kind.removeprefix("sensevoice_") in message


def test_a_missing_decoder_or_front_end_is_refused_when_the_codec_is_opened(tmp_path):
    assert "nowhere: no such folder" in refusal("glm4voice", TOKENIZER, flow_path=tmp_path / "nowhere")
    assert "am.mvn" in refusal("sensevoice_glm4voice", TOKENIZER, frontend_path=tmp_path)
    assert "frontend_path" in refusal("sensevoice_glm4voice", TOKENIZER)
    assert "neither was given" in refusal("glm4voice")
    assert "none was given" in refusal("mel_vq")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_an_incomplete_folder_is_refused_with_the_missing_file(tmp_path, name):
    shutil.copytree(TOKENIZER, tmp_path / "copy", ignore=shutil.ignore_patterns(name))
    assert f"no {name} there" in refusal("glm4voice", tmp_path / "copy")


@pytest.mark.parametrize("name", ["flow", "hift"])
def test_an_incomplete_decoder_is_refused_with_the_missing_file(tmp_path, name):
    shutil.copytree(DECODER, tmp_path / "copy", ignore=shutil.ignore_patterns(f"{name}.*"))
    assert f"no {name}.safetensors or {name}.pt there" in refusal("glm4voice", flow_path=tmp_path / "copy")


def test_truncated_weights_are_noticed_without_loading_them(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(TOKENIZER, copy, copy_function=shutil.copyfile)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: cut off or damaged" in refusal("glm4voice", copy)


def test_a_codec_opens_for_decoding_alone():
    codec = get_audio_tokenizer("glm4voice", flow_path=DECODER)
    both = get_audio_tokenizer("glm4voice", TOKENIZER, flow_path=DECODER)
    assert torch.equal(codec.decode([1, 2, 3], steps=1), both.decode([1, 2, 3], steps=1))
    assert len(codec.push_many([codec.stream()], [[1] * 12], [True])[0])
    assert (codec.codebook_size, codec.sample_rate) == (256, 22050)
    assert codec.fingerprint.startswith("glm4voice-decoder-")
    for ask in (codec.encode, lambda clip: codec.encode_batch([clip]), lambda clip: codec.encode_stream()):
        with pytest.raises(ValueError, match="only decodes: encoding needs the tokenizer's folder"):
            ask(CLIP)


def test_a_codec_opens_for_encoding_alone():
    codec = get_audio_tokenizer("glm4voice", TOKENIZER)
    assert codec.encode(CLIP)
    for ask in (codec.decode, lambda codes: codec.stream().push(codes)):
        with pytest.raises(ValueError, match="only encodes: decoding needs the decoder's folder, flow_path"):
            ask([1, 2, 3])


def test_a_plus_codec_needs_no_tokenizer_to_make_features_and_to_decode():
    codec = get_audio_tokenizer("sensevoice_glm4voice", flow_path=DECODER, frontend_path=SENSEVOICE)
    assert codec.features(CLIP).shape[1] == 560
    assert len(codec.decode([1, 2, 3], steps=1))
    with pytest.raises(ValueError, match="only decodes"):
        codec.encode(CLIP)
    speaks = get_audio_tokenizer("sensevoice_glm4voice", flow_path=DECODER)
    assert speaks.continuous_input
    for ask in (lambda: speaks.features(CLIP), speaks.feature_stream, lambda: speaks.feature_fingerprint):
        with pytest.raises(ValueError, match="only decodes: features need frontend_path"):
            ask()


def test_importing_the_codecs_loads_none_of_their_heavy_libraries():
    heavy = ("librosa", "sklearn", "matplotlib", "audioread", "datasets", "torchdata")
    code = (
        "import sys, vita_audio.audio, vita_audio.audio.mel_vq, vita_audio.audio.glm4voice;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
