"""Parameters, bytes and floating-point operations of a pass, from a config alone.

    cost = backbone_pass(config, new=1, cached=2000) + lm_head_pass(config, positions=1)
    seconds = max(cost.flops / flops_per_second, cost.bytes / bytes_per_second)

A pass computes ``new`` positions of each row while ``cached`` earlier ones are in the cache: prefill has many new
positions, decoding one, training all and no cache. Benchmarks compare a measured pass with these numbers, and the
training planner adds them up.

Operations are counted as by ``torch.utils.flop_counter``: two per multiply-add of a matrix product, attention as if
every new position read all others (a causal kernel may skip half), and nothing else. Bytes are those that have to
move at least once: weights, keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vita_audio.models.configuration import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig

AUDIO_ENCODER = "audio encoder"
AUDIO_ADAPTER = "audio adapter"
HEADS = "heads"
LANGUAGE_MODEL = "language model"
LORA_ADAPTERS = "LoRA adapters"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear maps of a decoder layer, in the order in which they run."""


@dataclass(frozen=True)
class Cost:
    """The cost of one pass, or of several.

    Attributes:
        flops: floating-point operations.
        weight_bytes: bytes of weights that are read.
        cache_bytes: bytes of keys and values that are read and written.
    """

    flops: int = 0
    weight_bytes: int = 0
    cache_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All bytes that move."""
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.weight_bytes * times, self.cache_bytes * times)


# -- parameters -----------------------------------------------------------------------------------------------


def count_parameters(config: Qwen2MTPConfig) -> dict[str, int]:
    """Parameters of each part: language model, heads, audio encoder and audio adapter.

    The language model includes the token embedding, the LM head and the final norm. Parts that a model lacks are
    omitted; the names are those of :func:`vita_audio.training.stages.describe_trainable`.
    """
    d, num_heads = config.hidden_size, config.num_nextn_predict_layers
    counts = {
        LANGUAGE_MODEL: config.num_backbone_layers * layer_parameters(config)
        + vocabulary_parameters(config)
        + d
    }
    if num_heads:
        counts[HEADS] = num_heads * head_parameters(config)
    if isinstance(config, Qwen2MTPSenseVoiceConfig):
        counts |= {name: _size(module) for name, module in _audio_modules(config).items()}
    return counts


def vocabulary_parameters(config: Qwen2MTPConfig) -> int:
    """Parameters of the token embedding and the LM head."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def adapter_parameters(config: Qwen2MTPConfig, rank: int, projections: Collection[str]) -> int:
    """Parameters of LoRA adapters of a rank on these projections of all backbone layers."""
    sizes = projection_sizes(config)
    return config.num_backbone_layers * rank * sum(sum(sizes[name]) for name in projections)


def layer_parameters(config: Qwen2MTPConfig) -> int:
    """Parameters of one decoder layer."""
    biases = config.num_attention_heads * _head_size(config) + 2 * _key_value_size(config)
    return layer_products(config) + biases + 2 * config.hidden_size


def head_parameters(config: Qwen2MTPConfig) -> int:
    """Parameters of one MCTP head: a decoder layer, the projection from 2d to d, and two norms."""
    d = config.hidden_size
    return layer_parameters(config) + 2 * d * d + 2 * d


def projection_sizes(config: Qwen2MTPConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each of a decoder layer's :data:`PROJECTIONS`."""
    d, intermediate = config.hidden_size, config.intermediate_size
    attention, key_value = config.num_attention_heads * _head_size(config), _key_value_size(config)
    sizes = [(d, attention), (d, key_value), (d, key_value), (attention, d)]
    sizes += [(d, intermediate), (d, intermediate), (intermediate, d)]
    return dict(zip(PROJECTIONS, sizes, strict=True))


# -- passes ---------------------------------------------------------------------------------------------------


def backbone_pass(
    config: Qwen2MTPConfig, new: int = 1, cached: int = 0, rows: int = 1, *, value_bytes: int = 2
) -> Cost:
    """A pass through the backbone, without LM head.

    Args:
        new: positions computed in each row.
        cached: positions of each row that the cache already holds.
        rows: sequences in the batch.
        value_bytes: bytes of a weight and of a cached value.
    """
    layers = config.num_backbone_layers
    cost = _layer_pass(config, new, cached, rows, value_bytes) * layers
    return cost + Cost(weight_bytes=value_bytes * config.hidden_size)


def head_pass(
    config: Qwen2MTPConfig, new: int = 1, cached: int = 0, rows: int = 1, *, value_bytes: int = 2
) -> Cost:
    """A pass through one MCTP head, without LM head; arguments as for :func:`backbone_pass`."""
    d, tokens = config.hidden_size, rows * new
    # The shared final norm is read as well.
    own = Cost(2 * tokens * 2 * d * d, value_bytes * (2 * d * d + 3 * d))
    return _layer_pass(config, new, cached, rows, value_bytes) + own


def lm_head_pass(config: Qwen2MTPConfig, positions: int = 1, *, value_bytes: int = 2) -> Cost:
    """Logits of ``positions`` positions, those of all rows together."""
    matrix = config.hidden_size * config.vocab_size
    return Cost(2 * positions * matrix, value_bytes * matrix)


def audio_pass(config: Qwen2MTPSenseVoiceConfig, frames: int, *, value_bytes: int = 2) -> dict[str, Cost]:
    """SenseVoice encoder and adapter on one clip of the Plus family, each with its cost.

    Args:
        frames: feature frames of the clip, 16.7 a second; four query frames are added.
    """
    return {
        name: Cost(_audio_flops(config.to_json_string(), name, frames), value_bytes * _size(module))
        for name, module in _audio_modules(config).items()
    }


def attention_flops(config: Qwen2MTPConfig, new: int, cached: int = 0) -> int:
    """Both matrix products of attention in one layer and row: scores, and weighted values."""
    return 4 * new * (cached + new) * config.num_attention_heads * _head_size(config)


def cache_bytes_per_position(config: Qwen2MTPConfig, *, value_bytes: int = 2) -> int:
    """Keys and values of one position in one layer."""
    return 2 * _key_value_size(config) * value_bytes


def _layer_pass(config: Qwen2MTPConfig, new: int, cached: int, rows: int, value_bytes: int) -> Cost:
    products = 2 * rows * new * layer_products(config)
    return Cost(
        flops=products + rows * attention_flops(config, new, cached),
        weight_bytes=value_bytes * layer_parameters(config),
        cache_bytes=rows * (cached + new) * cache_bytes_per_position(config, value_bytes=value_bytes),
    )


def layer_products(config: Qwen2MTPConfig) -> int:
    """Multiply-adds of one position in one layer's linear maps, which is the size of their matrices."""
    return sum(inputs * outputs for inputs, outputs in projection_sizes(config).values())


def _head_size(config: Qwen2MTPConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _key_value_size(config: Qwen2MTPConfig) -> int:
    heads = config.num_key_value_heads
    return _head_size(config) * (config.num_attention_heads if heads is None else heads)


# -- the Plus family's audio input ------------------------------------------------------------------------------


def _audio_modules(config: Qwen2MTPSenseVoiceConfig) -> dict[str, nn.Module]:
    """The modules without memory: their shapes are known, their weights are not."""
    from vita_audio.models.modeling_sensevoice import AudioModel, AudioProjection

    with torch.device("meta"):
        encoder = AudioModel(config)
        adapter = AudioProjection(encoder.model.config.output_size, config.hidden_size)
    return {AUDIO_ENCODER: encoder, AUDIO_ADAPTER: adapter}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@lru_cache(maxsize=64)
def _audio_flops(config_json: str, name: str, frames: int) -> int:
    """Counted by torch itself on tensors without memory; the encoder has too many parts for a formula."""
    config = Qwen2MTPSenseVoiceConfig(**json.loads(config_json))
    modules = _audio_modules(config)
    encoder = modules[AUDIO_ENCODER].eval()
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        size = (config.audio_encoder or {})["input_size"]
        encoded, _ = encoder(torch.empty(1, frames, size), [frames])
        inside = counter.get_total_flops()
        modules[AUDIO_ADAPTER](encoded)
        both = counter.get_total_flops()
    return inside if name == AUDIO_ENCODER else both - inside
