"""Each stage trains what it should, at the rate it should."""

import pytest
import torch
from torch import nn

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.training import apply_stage, parameter_groups
from vita_audio.training.stages import describe_trainable


@pytest.fixture
def model():
    config = Qwen2MTPConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_nextn_predict_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return Qwen2MTPForCausalLM(config)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_with_a_frozen_language_model_only_the_heads_train(model):
    apply_stage(model, language_model_freeze=True)
    heads = ("model.layers.2.", "model.layers.3.", "mtp_")
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(heads)}


def test_a_later_stage_trains_again_what_an_earlier_one_froze(model):
    apply_stage(model, language_model_freeze=True)
    apply_stage(model, language_model_freeze=False)
    assert len(trained(model)) == len(list(model.named_parameters()))


def test_heads_learn_at_their_own_rate_and_vectors_are_not_decayed(model):
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, head_multiplier=10.0)
    rate_of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rate_of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate, decay = rate_of[id(parameter)]
        in_head = name.startswith(("model.layers.2.", "model.layers.3.", "mtp_"))
        assert rate == (1e-2 if in_head else 1e-3), name
        assert decay == (0.1 if parameter.dim() > 1 else 0.0), name


def test_norms_are_decayed_if_the_published_rule_is_requested(model):
    model.layer_norm = nn.LayerNorm(4)  # the Plus adapter's kind, which that rule exempts
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, decay_norms=True)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    spared = {name for name, p in model.named_parameters() if decay_of[id(p)] == 0}
    assert spared == {name for name, _ in model.named_parameters() if name.endswith("bias")} | {
        "layer_norm.weight"
    }
    assert any(name.endswith("norm.weight") for name, _ in model.named_parameters() if name not in spared)


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty(model):
    apply_stage(model, language_model_freeze=True)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0)
    assert all(group["params"] for group in groups)
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


def test_tied_embeddings_are_in_one_group_only():
    config = Qwen2MTPConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    groups = parameter_groups(Qwen2MTPForCausalLM(config), 1e-3, 0.0)
    parameters = [id(p) for group in groups for p in group["params"]]
    assert len(parameters) == len(set(parameters))
    torch.optim.AdamW(groups)


def test_the_description_counts_what_trains(model):
    apply_stage(model, language_model_freeze=True)
    text = describe_trainable(model)
    heads = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"heads: {heads:,} of {heads:,}" in text
    assert "language model: 0 of" in text
