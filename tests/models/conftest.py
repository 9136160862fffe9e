"""Models and model folders that several test files use."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM

SENSEVOICE_GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"


@pytest.fixture(scope="session")
def sensevoice_checkpoint(tmp_path_factory):
    """The golden Plus model in the released layout."""
    folder = tmp_path_factory.mktemp("sensevoice_lm")
    config = json.loads((SENSEVOICE_GOLDENS / "lm_config.json").read_text())
    config |= {"model_type": "qwen2_mtp_sensevoice", "architectures": ["Qwen2MTPSenseVoiceForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(SENSEVOICE_GOLDENS / "lm_weights.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def save_qwen2():
    """Saves a plain, randomly initialised Qwen2 and returns its folder."""

    def save(folder: Path, max_shard_size: str = "1GB", **sizes: int | bool) -> Path:
        torch.manual_seed(0)
        defaults = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen2Config(**defaults | heads | sizes)
        Qwen2ForCausalLM(config).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return save


@pytest.fixture
def windowed():
    """A layer that attends to everything, then a layer and a head that attend to four positions."""
    torch.manual_seed(0)
    config = Qwen2MTPConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    return Qwen2MTPForCausalLM(config).eval()
