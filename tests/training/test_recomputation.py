"""``--checkpointed_layers``: whole runs in which some layers recompute their activations and the others keep them."""

import json
import logging

import pytest
import torch

from vita_audio.cli import finetune
from vita_audio.models.open import open_config
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.planner import plan_run
from vita_audio.training.trainer import SpeechTrainer

LAYERS = 4  # two of the backbone, two heads


@pytest.fixture
def run(tiny_world, tmp_path, monkeypatch, caplog):
    """Train into ``tmp_path / name``; the losses, and how many layers recomputed their activations."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    trainers = []

    class Noted(SpeechTrainer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            trainers.append(self)

    monkeypatch.setattr(finetune, "SpeechTrainer", Noted)
    caplog.set_level(logging.INFO)

    def train(name, **options):
        finetune.main(words(tiny_world, tmp_path / name, **options))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        recomputing = [layer.gradient_checkpointing for layer in trainers[-1].model.model.layers]
        assert recomputing == sorted(recomputing, reverse=True), "the first ones"
        return [line["loss"] for line in history if "loss" in line], sum(recomputing)

    return train


def words(world, folder, **options):
    common = {"num_nextn_predict_layers": 2, "gradient_checkpointing": True, "max_steps": 2}
    return world.options(folder, **common, **options)


def test_the_plan_chooses_how_many_layers_recompute_and_the_losses_stay(run, tiny_world, tmp_path, caplog):
    losses, every = run("all")
    assert every == LAYERS
    given = parse_arguments(words(tiny_world, tmp_path / "planned", checkpointed_layers=2))
    plan = plan_run(open_config(str(tmp_path / "all")), *given, gpus=1, dtype=torch.float32, device="cpu")
    for memory, layers in ((1.0, 0), ((plan.peak_bytes + 1) / 0.9e9, 2), (1e-6, LAYERS)):
        caplog.clear()
        found = run(f"auto_{layers}", checkpointed_layers="auto", gpu_memory_gb=memory)
        assert found == (losses, layers)
        assert f"{layers} of {LAYERS} layers recompute their activations: planned" in caplog.text
    assert run("fixed", checkpointed_layers=1) == (losses, 1)
