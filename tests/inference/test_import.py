"""What importing a part loads, in separate processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["torchdata", "datasets", "deepspeed", "sklearn", "matplotlib", "librosa", "pyarrow", "tensorboard"]


@pytest.mark.parametrize(
    "module", ["vita_audio", "vita_audio.inference", "vita_audio.chat", "vita_audio.audio"]
)
def test_an_import_brings_neither_training_nor_modeling_code(module):
    code = f"import sys, {module}; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert module in loaded
    assert not loaded & {*HEAVY, "transformers.modeling_utils", "vita_audio.data", "vita_audio.training"}


def test_the_auto_classes_open_a_checkpoint_after_the_package_is_imported(tiny_world):
    code = (
        "import sys, vita_audio; from transformers import AutoConfig, AutoModel, AutoModelForCausalLM; "
        "config = AutoConfig.from_pretrained(sys.argv[1]); "
        "print(type(config).__name__, type(AutoModel.from_config(config)).__name__, "
        "type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_world.model_dir)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["Qwen2MTPConfig", "Qwen2MTPModel", "Qwen2MTPForCausalLM"]


@pytest.mark.parametrize("order", ["vita_audio first", "transformers first"])
def test_the_processor_is_registered_in_either_order_of_imports(tiny_world, order):
    imports = ["import vita_audio", "from transformers import AutoProcessor"]
    if order == "transformers first":
        imports.reverse()
    code = (
        f"import sys; {'; '.join(imports)}; print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_world.model_dir)], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["VitaAudioProcessor"]
