"""Qwen2MTPSenseVoiceForCausalLM: golden numbers, packed training with and without audio, generation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vita_audio.models import (
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    freeze_audio_encoder,
    freeze_backbone,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"


def arrays(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / name).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The golden model in the released layout."""
    folder = tmp_path_factory.mktemp("sensevoice_lm")
    config = json.loads((GOLDENS / "lm_config.json").read_text())
    config |= {"model_type": "qwen2_mtp_sensevoice", "architectures": ["Qwen2MTPSenseVoiceForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDENS / "lm_weights.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def evaluation_case(name):
    golden = arrays("lm_eval.npz")
    audios = {"a": ["audio_f1", "audio_f2"], "b": ["audio_f3", "audio_f2"]}[name]
    inputs = {
        "input_ids": golden[f"{name}_input_ids"],
        "audios": [golden[audio] for audio in audios],
        "audio_indices": [golden[f"{name}_audio_indices_{i}"] for i in range(2)],
    }
    return inputs, golden


def training_batch():
    golden = arrays("lm_train.npz")
    count = int(golden["num_audios"])
    batch = {name: golden[name] for name in ("input_ids", "labels", "position_ids")}
    batch["audios"] = [golden[f"audio_{i}"] for i in range(count)]
    batch["audio_indices"] = [golden[f"audio_indices_{i}"] for i in range(count)]
    return batch, golden


RUNS = json.loads((GOLDENS / "lm_train.json").read_text())["runs"]


def test_the_auto_classes_open_the_released_layout(checkpoint, model):
    assert isinstance(AutoConfig.from_pretrained(checkpoint), Qwen2MTPSenseVoiceConfig)
    assert type(model) is Qwen2MTPSenseVoiceForCausalLM
    assert not model.training


@pytest.mark.parametrize("case", ["a", "b"])
def test_evaluation_logits_equal_the_golden(model, case):
    inputs, golden = evaluation_case(case)
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, golden[f"{case}_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["a", "b"])
def test_encoder_adapter_and_spliced_embeddings_equal_the_golden(model, case):
    inputs, golden = evaluation_case(case)
    seen = {}
    model.model.audio_model.register_forward_hook(lambda m, args, out: seen.update(encoded=out[0]))
    model.model.audio_projection.register_forward_hook(lambda m, args, out: seen.update(projected=out))
    model.model.layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(embeds=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
    projected = seen["projected"].split([indices.shape[-1] for indices in inputs["audio_indices"]])
    for i, rows in enumerate(projected):
        for actual, key in ((seen["encoded"][i], "encoder_out"), (rows, "projected")):
            expected = golden[f"{case}_{key}"][i, : len(rows)]
            torch.testing.assert_close(actual[: len(rows)], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(seen["embeds"], golden[f"{case}_inputs_embeds"], atol=1e-4, rtol=0)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run_case(model, name):
    """One of the golden training runs; the output of its forward and backward passes."""
    batch, _ = training_batch()
    if not RUNS[name]["audio_passed"]:
        del batch["audios"], batch["audio_indices"]
    if name == "llm_frozen_stage":
        freeze_backbone(model)
    output = model.train()(**batch, num_items_in_batch=RUNS[name]["num_items_in_batch"])
    output.loss.backward()
    return output


@pytest.mark.parametrize("run", RUNS)
def test_training_losses_and_gradient_norms_equal_the_golden(model, run):
    expected = RUNS[run]
    output = run_case(model, run)
    torch.testing.assert_close(output.loss.item(), expected["total_loss"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(
        [loss.item() for loss in output.mtp_losses], expected["mtp_head_losses"], atol=1e-5, rtol=1e-6
    )
    norms = released_norms(model)
    for name, norm in expected["grad_l2_norms"].items():
        if norm is None:
            assert norms.get(name) is None, name
        else:
            torch.testing.assert_close(norms[name], norm, rtol=1e-4, atol=1e-7, msg=name)


def released_norms(model):
    """Gradient norms under the names of the checkpoint."""
    return {name: grad.norm().item() for name, grad in gradients(model).items()}


def test_full_gradients_equal_the_golden(model):
    _, golden = training_batch()
    run_case(model, "mean_reduction")
    ours = gradients(model)
    names = [key for key in golden if key.startswith("grad::")]
    assert names
    for key in names:
        torch.testing.assert_close(ours[key.removeprefix("grad::")], golden[key], atol=1e-5, rtol=1e-4)
