"""The cost of a pass as computed from a config, against what torch counts in the real model."""

from collections import Counter

import pytest
import torch
from sizes import SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache

from vita_audio.models import (
    Qwen2MTPConfig,
    Qwen2MTPForCausalLM,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    is_head_parameter,
)
from vita_audio.models.cache import MCTPCache
from vita_audio.models.cost import (
    AUDIO_ADAPTER,
    AUDIO_ENCODER,
    HEADS,
    LANGUAGE_MODEL,
    Cost,
    audio_pass,
    backbone_pass,
    cache_bytes_per_position,
    count_parameters,
    head_pass,
    lm_head_pass,
)

ENCODER = {"input_size": 16, "output_size": 12, "attention_heads": 2, "linear_units": 20, "num_blocks": 2}


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.fixture
def model() -> Qwen2MTPForCausalLM:
    return Qwen2MTPForCausalLM(Qwen2MTPConfig(**SIZES, attn_implementation="eager")).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plus", [False, True])
def test_parameters_of_every_part_equal_the_models(tied, plus):
    if plus:
        config = Qwen2MTPSenseVoiceConfig(**SIZES, tie_word_embeddings=tied, audio_encoder=ENCODER)
    else:
        config = Qwen2MTPConfig(**SIZES, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = (Qwen2MTPSenseVoiceForCausalLM if plus else Qwen2MTPForCausalLM)(config)
    model.tie_weights()
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if is_head_parameter(model, name):
            parts[HEADS] += parameter.numel()
        elif name.startswith("model.audio_model."):
            parts[AUDIO_ENCODER] += parameter.numel()
        elif name.startswith("model.audio_projection."):
            parts[AUDIO_ADAPTER] += parameter.numel()
        else:
            parts[LANGUAGE_MODEL] += parameter.numel()
    assert count_parameters(config) == dict(parts)


@pytest.mark.parametrize(("new", "cached", "rows"), [(7, 0, 1), (1, 9, 1), (3, 5, 2)])
def test_operations_of_a_backbone_pass_equal_torchs_count(model, new, cached, rows):
    ids = torch.zeros(rows, cached + new, dtype=torch.long)
    positions = torch.arange(cached + new).repeat(rows, 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if cached:
            model.model(
                ids[:, :cached], position_ids=positions[:, :cached], past_key_values=cache, use_cache=True
            )
        flops = counted(
            lambda: model.model(
                ids[:, cached:], position_ids=positions[:, cached:], past_key_values=cache, use_cache=True
            )
        )
    assert backbone_pass(model.config, new, cached, rows).flops == flops


@pytest.mark.parametrize("new", [1, 6])
def test_operations_of_a_head_and_the_lm_head_equal_torchs_count(model, new):
    config = model.config
    hidden = torch.zeros(2, new, config.hidden_size)
    positions = torch.arange(new).repeat(2, 1)

    def one_pass() -> None:
        rotary = model.model.rotary_emb(hidden, positions)
        model.heads[0](
            hidden, hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions
        )

    with torch.no_grad():
        assert head_pass(config, new, rows=2).flops == counted(one_pass)
        assert lm_head_pass(config, 2 * new).flops == counted(lambda: model.lm_head(hidden))


def test_operations_of_the_audio_input_equal_torchs_count():
    config = Qwen2MTPSenseVoiceConfig(**SIZES, audio_encoder=ENCODER)
    model = Qwen2MTPSenseVoiceForCausalLM(config).eval()
    costs = audio_pass(config, frames=9)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # torch counts no fused kernel of the CPU
        flops = counted(lambda: model.model.encode_audio([torch.zeros(9, 16)]))
    assert costs[AUDIO_ENCODER].flops + costs[AUDIO_ADAPTER].flops == flops
    assert costs[AUDIO_ADAPTER].flops == 2 * 13 * (12 * 24 + 24 * 24)


def test_bytes_are_the_weights_that_are_read_and_the_keys_and_values(model):
    config = model.config
    layers = [*model.model.layers[: config.num_backbone_layers], model.model.norm]
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    cache = MCTPCache(config)
    with torch.no_grad():
        model.model(torch.zeros(2, 6, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)
    cost = backbone_pass(config, new=1, cached=5, rows=2, value_bytes=4)
    assert cost.weight_bytes == 4 * weights
    assert cost.cache_bytes == held == 12 * 3 * cache_bytes_per_position(config, value_bytes=4)
    head = model.heads[0]
    modules = (head.embed_norm, head.hidden_norm, head.proj, head.layer, head.final_norm)
    read = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert head_pass(config, value_bytes=4).weight_bytes == 4 * read
    assert lm_head_pass(config, 3, value_bytes=4).weight_bytes == model.lm_head.weight.nbytes


def test_costs_add_up_to_those_of_a_round():
    config = Qwen2MTPConfig(**SIZES)
    parts = [backbone_pass(config), head_pass(config), lm_head_pass(config)]
    total = sum(parts, Cost())
    assert total.bytes == sum(part.bytes for part in parts)
    assert (parts[1] * 10).flops == 10 * parts[1].flops
