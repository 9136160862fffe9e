"""Small random models that the engine's tests run."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import vita_audio  # noqa: F401
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM

GOLDENS = Path(__file__).parents[1] / "goldens" / "mctp"


def random_model(seed: int = 0, **changes) -> Qwen2MTPForCausalLM:
    """Random weights, large enough that the most likely token is clear and depends on the whole prompt."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_nextn_predict_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return Qwen2MTPForCausalLM(Qwen2MTPConfig(**settings | changes)).eval()


@pytest.fixture(scope="session")
def golden_model():
    return AutoModelForCausalLM.from_pretrained(GOLDENS / "checkpoint")


@pytest.fixture(scope="session")
def model():
    return random_model()
