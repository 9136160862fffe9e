"""The figures of a run that are not its loss: the same with DeepSpeed as without, and on a step that logs nothing."""

from pathlib import Path

import pytest
import torch

from vita_audio.models.modeling import Predictions
from vita_audio.training.statistics import PredictionSums, accuracies, breakdown

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools/finetune_sts.py"
CONFIGS = REPOSITORY / "scripts/deepspeed"


def test_sums_are_those_of_each_prediction_and_start_again_when_read():
    sums = PredictionSums(1, 2, torch.device("cpu"))
    kinds = torch.tensor([[0, 0, 1, 1]])
    predictions = Predictions(
        head=torch.tensor([0, 0, 0, 1]),
        position=torch.tensor([0, 2, 3, 1]),
        loss=torch.tensor([1.0, 2.0, 4.0, 8.0]),
        hit=torch.tensor([True, False, True, True]),
    )
    sums.add(predictions, kinds)
    sums.add(predictions, kinds)
    total = sums.take()
    assert accuracies(total) == {"main_accuracy": pytest.approx(2 / 3), "mtp_accuracy_0": 1.0}
    assert breakdown(total, [("set one", "ASR"), ("two", "speech QA")]) == {
        "task/asr/main_loss": 1.0,
        "task/asr/main_accuracy": 1.0,
        "task/asr/mtp_loss_0": 8.0,
        "task/asr/mtp_accuracy_0": 1.0,
        "task/speech_qa/main_loss": 3.0,
        "task/speech_qa/main_accuracy": 0.5,
        "source/set_one/main_loss": 1.0,
        "source/set_one/main_accuracy": 1.0,
        "source/set_one/mtp_loss": 8.0,
        "source/set_one/mtp_accuracy": 1.0,
        "source/two/main_loss": 3.0,
        "source/two/main_accuracy": 0.5,
    }
    assert not sums.take().any()


@pytest.mark.slow
def test_gradient_norms_of_the_parts_are_the_same_with_every_zero_stage(tiny_world, tmp_path):
    import json

    logged = {}
    for name in ("none", "zero2", "zero3"):
        options = {
            "num_nextn_predict_layers": 2,
            "max_steps": 2,
            "save_strategy": "no",
            "ddp_backend": "gloo",
        }
        options |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "decay_norms": True}
        if name != "none":
            config = json.loads((CONFIGS / f"ds_config_{name}.json").read_text())
            config.pop("optimizer")  # one that DeepSpeed builds has one rate
            config |= {"zero_allow_untested_optimizer": True}
            (tmp_path / f"{name}.json").write_text(json.dumps(config))
            options["deepspeed"] = tmp_path / f"{name}.json"
        run = tiny_world.launch(2, TOOL, *tiny_world.options(tmp_path / name, **options))
        assert run.returncode == 0, run.stderr[-3000:]
        logged[name] = tiny_world.logged(tmp_path / name)
    for name, lines in logged.items():
        for line, want in zip(lines, logged["none"], strict=True):
            assert line["grad_norm"] > 0.2, "clipped"
            for part in ("grad_norm", "grad_norm/heads", "grad_norm/language_model"):
                assert line[part] == pytest.approx(want[part], rel=1e-3), (name, part)
            assert line["main_accuracy"] == pytest.approx(want["main_accuracy"], abs=1e-3)
            assert line["task/text/main_loss"] == pytest.approx(want["task/text/main_loss"], rel=1e-3)
