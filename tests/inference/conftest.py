"""A tiny model of the Plus family, in addition to ``tiny_world``."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from vita_audio.models import Qwen2MTPSenseVoiceConfig, Qwen2MTPSenseVoiceForCausalLM

_GOLDENS = Path(__file__).parents[1] / "goldens"
_ENCODER = {"output_size": 32, "attention_heads": 2, "linear_units": 64, "num_blocks": 2, "tp_blocks": 1}


@pytest.fixture(scope="session")
def plus_model_dir(tmp_path_factory) -> Path:
    """Random weights, large enough that different questions get different replies."""
    folder = tmp_path_factory.mktemp("plus")
    tokenizer = AutoTokenizer.from_pretrained(_GOLDENS / "data" / "tokenizer" / "sensevoice_glm4voice")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2MTPSenseVoiceConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_nextn_predict_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
        audio_encoder=_ENCODER | {"ctc_vocab_size": 8},
    )
    Qwen2MTPSenseVoiceForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def frontend_dir() -> Path:
    return _GOLDENS / "sensevoice"
