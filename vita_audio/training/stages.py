"""The trainable parameters of the four stages, and their learning rates.

=====  ==================  ======================  =======================
stage  script              trains                  heads' learning rate
=====  ==================  ======================  =======================
1      stage1              LLM (Plus: + adapter)   no heads
2      mtp1_stage1         one head                as given
3      mtp10_stage1        ten heads               as given
4      mtp10_stage2        everything              ten times the LLM's
=====  ==================  ======================  =======================

The SenseVoice encoder stays frozen throughout unless requested otherwise.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from vita_audio.models import freeze_audio_encoder, freeze_backbone, is_head_parameter
from vita_audio.models.cost import AUDIO_ADAPTER, AUDIO_ENCODER, HEADS, LANGUAGE_MODEL
from vita_audio.models.weights import WRAPPED

LORA = "LoRA adapters"


def apply_stage(
    model: PreTrainedModel, *, language_model_freeze: bool = False, audio_model_freeze: bool = True
) -> None:
    """Set ``requires_grad`` for one stage; everything that is not frozen here trains."""
    model.requires_grad_(True)
    if language_model_freeze:
        freeze_backbone(model)
    if audio_model_freeze and model.config.continuous_input:
        freeze_audio_encoder(model)


def parameter_groups(
    model: PreTrainedModel,
    learning_rate: float,
    weight_decay: float,
    head_multiplier: float = 1.0,
    *,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters.

    Heads learn at ``learning_rate * head_multiplier``. Norms and biases (one-dimensional tensors) are not decayed.
    With ``decay_norms`` the RMSNorm weights are, as in the published stage 4, whose rule exempts only ``nn.LayerNorm``
    and biases. Empty groups are omitted, since DeepSpeed would refuse them.
    """
    layer_norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 a partitioned parameter is empty; ds_shape is its real shape.
            decayed = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            if decay_norms and not name.endswith("bias") and id(parameter) not in layer_norms:
                decayed = True
            key = (is_head_parameter(model, name), decayed)
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (head_multiplier if in_head else 1.0),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (in_head, decayed), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def describe_trainable(model: PreTrainedModel) -> str:
    """One line for the log: how many parameters of each part train."""
    trained: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = part_of(model, name)
        size = getattr(parameter, "ds_numel", parameter.numel())
        total[part] += size
        trained[part] += size * parameter.requires_grad
    return ", ".join(f"{part}: {trained[part]:,} of {total[part]:,} parameters train" for part in total)


def part_of(model: PreTrainedModel, name: str) -> str:
    """The part that a parameter belongs to, by the names of :func:`vita_audio.models.cost.count_parameters`."""
    name = name.removeprefix(WRAPPED)
    if is_head_parameter(model, name):
        return HEADS
    if ".lora_" in name:
        return LORA
    if name.startswith("model.audio_model."):
        return AUDIO_ENCODER
    return AUDIO_ADAPTER if name.startswith("model.audio_projection.") else LANGUAGE_MODEL
