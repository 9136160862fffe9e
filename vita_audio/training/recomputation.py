"""Gradient checkpointing of some layers only: the first ones recompute their activations, the others keep them.

The first, because the backward pass reaches them last: what the other layers kept has been freed by then, so the
recomputed layer comes on top of nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.models.compat import disable_checkpointing


def recompute_first(model: nn.Module, layers: int) -> None:
    """Keep the activations of all but the first layers that get a gradient.

    Args:
        model: with gradient checkpointing enabled; PEFT may wrap it.
        layers: how many recompute them. A head counts as one layer, its projection and norms included.
    """
    causal_lm = next(module for module in model.modules() if isinstance(module, Qwen2MTPForCausalLM))
    decoder = list(causal_lm.model.layers)
    with_gradient = layers_with_gradient(causal_lm.config, heads_only=causal_lm.has_frozen_backbone)
    for layer in decoder[len(decoder) - with_gradient + layers :]:
        disable_checkpointing(layer)


def layers_with_gradient(config: Qwen2MTPConfig, *, heads_only: bool) -> int:
    """Layers that keep activations for the backward pass: the heads', and the backbone's unless it is frozen."""
    heads: int = config.num_nextn_predict_layers
    return heads + (0 if heads_only else config.num_backbone_layers)


class RecomputeFirst(TrainerCallback):
    """Applies :func:`recompute_first` once the Trainer has enabled checkpointing."""

    def __init__(self, layers: int) -> None:
        self._layers = layers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        recompute_first(kwargs["model"], self._layers)
