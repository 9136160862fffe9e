"""Parameters by name: which belong to a head, how heads grow, which are frozen, how the vocabulary grows.

Released names are the module names, so a prefix identifies the owner of a parameter. This file works on any model with
that layout and imports no modeling file.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from vita_audio.constants import EMBEDDING_ROW_MULTIPLE
from vita_audio.models.configuration import Qwen2MTPConfig

logger = logging.getLogger(__name__)

WRAPPED = "base_model.model."
"""Prefix of all names in a model that PEFT wraps."""

Model = TypeVar("Model", bound=nn.Module)


def head_prefixes(config: Qwen2MTPConfig, k: int) -> tuple[str, ...]:
    """Prefixes of the names of head k's own parameters."""
    layer = f"model.layers.{config.num_backbone_layers + k}."
    return (layer, f"mtp_projs.{k}.", f"mtp_embed_norms.{k}.", f"mtp_hidden_norms.{k}.")


def is_head_parameter(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to a head. The shared embedding, final norm and LM head do not."""
    config = cast(Qwen2MTPConfig, model.config)
    heads = range(config.num_nextn_predict_layers)
    return name.removeprefix(WRAPPED).startswith(
        tuple(prefix for k in heads for prefix in head_prefixes(config, k))
    )


def freeze_backbone(model: Model) -> Model:
    """Train only the heads' own parameters, as stages 2 and 3 do."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head_parameter(model, name))
    return model


def freeze_audio_encoder(model: Model) -> Model:
    """Freeze the SenseVoice encoder of a Plus model: no gradients, and no dropout even in ``train()``.

    The adapter still trains.
    """
    backbone: Any = model.model
    backbone.audio_model.requires_grad_(False).eval()
    return model


def grow_heads(model: PreTrainedModel, grown: range) -> None:
    """Initialize new heads (SPEC "Initialisation and growth") and log what was copied.

    A model without heads gives each new head the backbone's last layer; projections and norms stay fresh. Otherwise
    each new head copies layer, projection and norms of the head before it. Heads are filled in order, so the second
    new head copies the first.
    """
    if not grown:
        return
    first: int = model.config.num_backbone_layers
    layers = cast(nn.ModuleList, model.model.layers)
    for k in grown:
        copy_parameters(layers[first + k - 1], layers[first + k])
        if grown.start > 0:
            for name in ("mtp_projs", "mtp_embed_norms", "mtp_hidden_norms"):
                copy_parameters(model.get_submodule(f"{name}.{k - 1}"), model.get_submodule(f"{name}.{k}"))
    source = f"backbone layer {first - 1}" if grown.start == 0 else f"head {grown.start - 1}"
    logger.warning("grown from %s: heads %s", source, ", ".join(map(str, grown)))


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy all parameters of one module to another of the same layout.

    Under ZeRO-3 the parameters are gathered first and rank 0's copy is kept.
    """
    gathered: AbstractContextManager[None] = nullcontext()
    if is_deepspeed_zero3_enabled():
        import deepspeed

        parameters = [*source.parameters(), *target.parameters()]
        gathered = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
    with gathered:
        for from_, to in zip(source.parameters(), target.parameters(), strict=True):
            to.copy_(from_)


def resize_vocabulary(model: PreTrainedModel, num_tokens: int) -> int:
    """Enlarge the vocabulary to ``num_tokens`` tokens, padded to a multiple of 8 rows. Never shrinks it.

    Returns:
        Rows of the embedding matrix.
    """
    if num_tokens > model.config.vocab_size:
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=EMBEDDING_ROW_MULTIPLE)
    return model.config.vocab_size
