"""Model folders that several test files open."""

import json
import shutil
from pathlib import Path

import pytest

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
