"""The language model family. Importing it registers the model types with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vita_audio.models.cache import MCTPCache
from vita_audio.models.checkpoint import (
    CheckpointError,
    freeze_backbone,
    is_head_parameter,
    load_with_heads,
    resize_vocabulary,
)
from vita_audio.models.configuration import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig
from vita_audio.models.modeling import MTPOutput, Qwen2MTPForCausalLM, Qwen2MTPModel
from vita_audio.models.modeling_sensevoice import (
    Qwen2MTPSenseVoiceForCausalLM,
    Qwen2MTPSenseVoiceModel,
    freeze_audio_encoder,
)

for config_class, backbone_class, causal_lm_class in (
    (Qwen2MTPConfig, Qwen2MTPModel, Qwen2MTPForCausalLM),
    (Qwen2MTPSenseVoiceConfig, Qwen2MTPSenseVoiceModel, Qwen2MTPSenseVoiceForCausalLM),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, backbone_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, causal_lm_class, exist_ok=True)

__all__ = [
    "CheckpointError",
    "MCTPCache",
    "MTPOutput",
    "Qwen2MTPConfig",
    "Qwen2MTPForCausalLM",
    "Qwen2MTPModel",
    "Qwen2MTPSenseVoiceConfig",
    "Qwen2MTPSenseVoiceForCausalLM",
    "Qwen2MTPSenseVoiceModel",
    "freeze_audio_encoder",
    "freeze_backbone",
    "is_head_parameter",
    "load_with_heads",
    "resize_vocabulary",
]
