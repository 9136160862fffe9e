"""Plus folders: released names, saving, starting from a plain Qwen2, growing heads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from vita_audio.audio.sensevoice import SenseVoiceEncoder
from vita_audio.models import (
    CheckpointError,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    load_with_heads,
)
from vita_audio.training.stages import apply_stage

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"


@pytest.fixture(scope="module")
def plain_qwen2(tmp_path_factory, save_qwen2):
    return save_qwen2(tmp_path_factory.mktemp("qwen2"), hidden_size=128)


def test_saving_gives_the_released_names_and_bits(sensevoice_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(sensevoice_checkpoint)
    model.save_pretrained(tmp_path)
    saved, original = (
        load_file(tmp_path / "model.safetensors"),
        load_file(sensevoice_checkpoint / "model.safetensors"),
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen2_mtp_sensevoice"
    assert config["audio_encoder"]["output_size"] == 32
    assert config["audio_encoder"]["sanm_shfit"] == 0
    assert config["num_hidden_layers"] == 6


def test_released_names_and_shapes_at_released_sizes():
    manifest = json.loads((GOLDENS / "manifest_qwen2_mtp_sensevoice_7b_mtp10.json").read_text())
    config = Qwen2MTPSenseVoiceConfig(
        vocab_size=168072,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=38,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_nextn_predict_layers=10,
    )
    with torch.device("meta"):
        model = Qwen2MTPSenseVoiceForCausalLM(config)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == manifest
    assert sum(value.numel() for value in model.parameters()) == 10_566_592_831


def test_a_plain_language_model_gets_encoder_weights_and_a_fresh_adapter(plain_qwen2):
    model = load_with_heads(plain_qwen2, 0, sensevoice=True, audio_model_path=GOLDENS)
    assert type(model) is Qwen2MTPSenseVoiceForCausalLM
    assert model.config.mtp_detach_backbone
    encoder = SenseVoiceEncoder.from_pretrained(GOLDENS)
    loaded = model.model.audio_model.model.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    adapter = model.model.audio_projection
    assert torch.equal(adapter.pre_proj_layernorm.weight, torch.ones(64))
    assert torch.equal(adapter.pre_proj_layernorm.bias, torch.zeros(64))
    for linear in (adapter.mlp[0], adapter.mlp[2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    original = load_file(plain_qwen2 / "model.safetensors")
    assert torch.equal(model.lm_head.weight, original["lm_head.weight"])


@pytest.mark.parametrize("nesting", ["state_dict", None])
def test_the_encoder_also_comes_from_a_model_pt_in_bfloat16(plain_qwen2, tmp_path, nesting):
    encoder = SenseVoiceEncoder.from_pretrained(GOLDENS)
    weights = {f"module.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({nesting: weights} if nesting else weights, tmp_path / "model.pt")
    shutil.copy(GOLDENS / "encoder_config.json", tmp_path / "config.json")
    model = load_with_heads(plain_qwen2, 1, sensevoice=True, audio_model_path=tmp_path, dtype=torch.bfloat16)
    loaded = model.model.audio_model.model.state_dict()
    assert all(torch.equal(loaded[name], value.bfloat16()) for name, value in encoder.state_dict().items())


def test_the_next_stage_keeps_the_encoder_of_the_checkpoint(plain_qwen2, tmp_path):
    first = load_with_heads(plain_qwen2, 0, sensevoice=True, audio_model_path=GOLDENS)
    with torch.no_grad():
        for parameter in first.model.audio_model.parameters():
            parameter.add_(1)
    first.save_pretrained(tmp_path)
    second = load_with_heads(tmp_path, 2, sensevoice=True, audio_model_path=GOLDENS)
    third = load_with_heads(tmp_path, 2)
    for model in (second, third):
        assert type(model) is Qwen2MTPSenseVoiceForCausalLM
        for name, value in first.state_dict().items():
            if "audio_" in name:
                assert torch.equal(model.state_dict()[name], value), name
    copied = second.model.layers[2].mlp.up_proj.weight
    assert torch.equal(copied, first.model.layers[1].mlp.up_proj.weight)


def test_each_family_grows_with_its_own_detaching(plain_qwen2, tmp_path):
    discrete = load_with_heads(plain_qwen2, 1)
    assert not discrete.config.mtp_detach_backbone
    discrete.save_pretrained(tmp_path / "discrete")
    plus = load_with_heads(tmp_path / "discrete", 2, sensevoice=True, audio_model_path=GOLDENS)
    assert plus.config.mtp_detach_backbone
    plus.save_pretrained(tmp_path / "plus")
    assert load_with_heads(tmp_path / "plus", 3).config.mtp_detach_backbone
    # What a folder of the same family says is kept.
    plus.config.mtp_detach_backbone = False
    plus.save_pretrained(tmp_path / "other")
    assert not load_with_heads(tmp_path / "other", 3).config.mtp_detach_backbone


@pytest.mark.parametrize("language_model_freeze", [False, True])
def test_a_stage_freezes_the_encoder_and_its_dropout_unless_asked_not_to(
    sensevoice_checkpoint, language_model_freeze
):
    model = load_with_heads(sensevoice_checkpoint, 2)
    for frozen in (True, False):
        apply_stage(model, language_model_freeze=language_model_freeze, audio_model_freeze=frozen)
        trains = {
            name: parameter.requires_grad
            for name, parameter in model.named_parameters()
            if name.startswith("model.audio_model.")
        }
        assert trains
        # A frozen language model trains heads alone, whatever is said of the encoder.
        assert set(trains.values()) == {not frozen and not language_model_freeze}
        assert model.train().model.audio_model.training == (not frozen and not language_model_freeze)
        adapter = model.model.audio_projection.mlp[0].weight
        assert adapter.requires_grad == (not language_model_freeze)


def test_the_bare_plus_backbone_is_initialized_as_a_whole():
    encoder = {"output_size": 64, "num_blocks": 2, "tp_blocks": 1, "linear_units": 32, "ctc_vocab_size": 8}
    config = Qwen2MTPSenseVoiceConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        audio_encoder=encoder,
    )
    adapter = AutoModel.from_config(config).audio_projection
    assert adapter.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_missing_encoder_without_path_and_a_torn_encoder_are_refused(
    plain_qwen2, sensevoice_checkpoint, tmp_path
):
    with pytest.raises(CheckpointError, match="audio_model_path"):
        load_with_heads(plain_qwen2, 0, sensevoice=True)
    weights = load_file(sensevoice_checkpoint / "model.safetensors")
    del weights["model.audio_model.model.encoder.tp_norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(sensevoice_checkpoint / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"tp_norm\.bias"):
        load_with_heads(tmp_path, 2, sensevoice=True, audio_model_path=GOLDENS)


def test_a_model_made_from_its_configuration_has_an_initialised_adapter():
    torch.manual_seed(0)
    encoder = {"output_size": 64, "num_blocks": 2, "tp_blocks": 1, "linear_units": 32, "ctc_vocab_size": 8}
    config = Qwen2MTPSenseVoiceConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        audio_encoder=encoder,
    )
    model = Qwen2MTPSenseVoiceForCausalLM(config)
    adapter = model.model.audio_projection
    assert torch.equal(adapter.pre_proj_layernorm.weight, torch.ones(64))
    assert adapter.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_an_encoder_of_another_kind_is_refused_in_the_configuration():
    with pytest.raises(ValueError, match="input_layer"):
        Qwen2MTPSenseVoiceConfig(audio_encoder={"input_layer": "conv2d"})
