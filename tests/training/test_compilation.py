"""``--torch_compile`` in a whole run; test_golden_losses.py has its losses in all stages."""

import json

import pytest
import torch
from safetensors import safe_open

from vita_audio.cli.finetune import main

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}


@pytest.fixture
def finetune(tiny_world, tmp_path, monkeypatch):
    """Train into ``tmp_path / name``, validated on its own mix; returns the folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(name, **options):
        validation = {"eval_dataset_name": tiny_world.root / "mix.yaml", "eval_steps": 2, "eval_samples": 8}
        main(tiny_world.options(tmp_path / name, num_nextn_predict_layers=1, **validation, **options))
        return tmp_path / name

    yield run
    torch.compiler.reset()


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[name] for line in history for name in ("loss", "eval_loss") if name in line]


def names(folder):
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_a_compiled_run_is_continued_with_and_without_the_option_and_keeps_the_names_of_its_weights(finetune):
    plain = finetune("plain")
    compiled = finetune("compiled", **COMPILED)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    for options in (COMPILED, {}):
        for marker in ("stage.complete", "checkpoint-4/checkpoint.complete"):
            (compiled / marker).unlink()
        finetune("compiled", **options)
        assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
        for folder in (".", "checkpoint-2", "checkpoint-4"):
            assert names(compiled / folder) == names(plain / folder)
    assert len(losses(plain)) == 6
