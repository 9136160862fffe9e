"""The language model family. Importing it registers the model types with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vita_audio.models.cache import MCTPCache
from vita_audio.models.configuration import Qwen2MTPConfig, Qwen2MTPSenseVoiceConfig
from vita_audio.models.folder import CheckpointError
from vita_audio.models.modeling import MTPOutput, Qwen2MTPForCausalLM, Qwen2MTPModel
from vita_audio.models.modeling_sensevoice import Qwen2MTPSenseVoiceForCausalLM, Qwen2MTPSenseVoiceModel
from vita_audio.models.open import check_device, load_with_heads, open_config, open_model, open_tokenizer
from vita_audio.models.weights import (
    freeze_audio_encoder,
    freeze_backbone,
    is_head_parameter,
    resize_vocabulary,
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
    "check_device",
    "freeze_audio_encoder",
    "freeze_backbone",
    "is_head_parameter",
    "load_with_heads",
    "open_config",
    "open_model",
    "open_tokenizer",
    "resize_vocabulary",
]
