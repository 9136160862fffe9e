"""Qwen2MTPSenseVoiceForCausalLM: golden numbers, packed training with and without audio, generation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from vita_audio.models import (
    MCTPCache,
    Qwen2MTPSenseVoiceConfig,
    Qwen2MTPSenseVoiceForCausalLM,
    freeze_audio_encoder,
    freeze_backbone,
)

GOLDENS = Path(__file__).parents[1] / "goldens" / "sensevoice"


def arrays(name):
    return {key: torch.from_numpy(value) for key, value in np.load(GOLDENS / name).items()}


@pytest.fixture
def model(sensevoice_checkpoint):
    return AutoModelForCausalLM.from_pretrained(sensevoice_checkpoint, dtype=torch.float32)


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


def test_the_auto_classes_open_the_released_layout(sensevoice_checkpoint, model):
    assert isinstance(AutoConfig.from_pretrained(sensevoice_checkpoint), Qwen2MTPSenseVoiceConfig)
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


GENERATION = json.loads((GOLDENS / "lm_generate.json").read_text())


@pytest.mark.parametrize("run", GENERATION["runs"], ids=lambda run: str(run["mtp_inference_mode"]))
def test_greedy_generation_with_audio_equals_the_golden(model, run):
    inputs, _ = evaluation_case("a")
    inputs["input_ids"] = torch.tensor([GENERATION["prompt_input_ids"]])
    mode = run["mtp_inference_mode"]
    output = model.generate(
        **inputs,
        mtp_inference_mode=mode,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert output.sequences[0, -24:].tolist() == run["new_tokens"]
    golden = arrays("lm_generate_logits.npz")["logits_mode_" + "_".join(map(str, mode))]
    torch.testing.assert_close(torch.cat(output.logits), golden, atol=1e-3, rtol=0)


def test_the_same_prompt_without_audio_gives_the_other_golden(model):
    expected = GENERATION["without_audio_first_mode"]
    output = model.generate(
        torch.tensor([GENERATION["prompt_input_ids"]]),
        mtp_inference_mode=expected["mtp_inference_mode"],
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    assert output[0, -24:].tolist() == expected["new_tokens"]


MODES = [[1, 2], [1, 1, 2, 2], [24, 0], [1, 4]]


def batched_prompts():
    """The golden prompt with its two audios, a short text prompt, and a prompt with one audio."""
    inputs, golden = evaluation_case("a")
    second = {"input_ids": torch.tensor([[5, 9, 400, 31]]), "audios": [], "audio_indices": []}
    third_ids = golden["b_input_ids"][:1]
    third = {
        "input_ids": third_ids,
        "audios": [golden["audio_f2"]],
        "audio_indices": [golden["b_audio_indices_1"]],
    }
    return [inputs, second, third]


def left_padded(prompts):
    """One batch of several prompts; positions of audio move with the padding."""
    width = max(prompt["input_ids"].shape[1] for prompt in prompts)
    batch = {"input_ids": [], "attention_mask": [], "audios": [], "audio_indices": []}
    for row, prompt in enumerate(prompts):
        ids = prompt["input_ids"][0]
        padding = width - len(ids)
        batch["input_ids"].append(torch.nn.functional.pad(ids, (padding, 0)))
        batch["attention_mask"].append(torch.arange(width) >= padding)
        batch["audios"] += prompt["audios"]
        batch["audio_indices"] += [
            torch.stack([torch.full_like(indices[1], row), indices[1] + padding])
            for indices in prompt["audio_indices"]
        ]
    batch["input_ids"] = torch.stack(batch["input_ids"])
    batch["attention_mask"] = torch.stack(batch["attention_mask"]).long()
    return batch


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_left_padded_batch_generates_what_each_prompt_does_alone(model, mode, use_cache):
    prompts = batched_prompts()
    options = {
        "mtp_inference_mode": mode,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "use_cache": use_cache,
    }
    together = model.generate(**left_padded(prompts), **options)[:, -12:]
    for row, prompt in enumerate(prompts):
        alone = model.generate(**prompt, **options)[:, -12:]
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("mode", [[1, 2], [8192, 0]], ids=str)
def test_several_sequences_per_prompt_use_the_audio_of_their_prompt(model, mode):
    prompts = batched_prompts()
    options = {"mtp_inference_mode": mode, "max_new_tokens": 8, "eos_token_id": None}
    once = model.generate(**left_padded(prompts), do_sample=False, **options)[:, -8:]
    twice = model.generate(
        **left_padded(prompts), do_sample=True, top_k=1, num_return_sequences=2, **options
    )[:, -8:]
    assert twice.tolist() == once.repeat_interleave(2, dim=0).tolist()


def test_beam_search_with_audio_equals_beam_search_on_its_embeddings(model):
    inputs, _ = evaluation_case("a")
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "eos_token_id": None}
    beams = model.generate(**inputs, **options)
    reference = model.generate(inputs_embeds=model.embed_inputs(**inputs), **options)
    assert beams[:, -6:].tolist() == reference[:, -6:].tolist()


@pytest.mark.parametrize(
    ("mode", "cache_class"), [([1, 2], MCTPCache), ([8192, 0], MCTPCache), ([8192, 0], DynamicCache)], ids=str
)
def test_a_second_turn_continues_from_the_cache_of_the_first(model, mode, cache_class):
    first, golden = evaluation_case("a")
    options = {"mtp_inference_mode": mode, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cache = cache_class(config=model.config)
    answer = model.generate(**first, past_key_values=cache, **options)
    turn = golden["b_input_ids"][:1]
    second = {
        "input_ids": torch.cat([answer, turn], dim=1),
        "audios": [*first["audios"], golden["audio_f2"]],
        "audio_indices": [
            *first["audio_indices"],
            golden["b_audio_indices_1"] + torch.tensor([0, answer.shape[1]]).view(2, 1, 1),
        ],
    }
    continued = model.generate(**second, past_key_values=cache, **options)
    assert continued.tolist() == model.generate(**second, **options).tolist()


def test_rows_without_audio_train_together_with_rows_with_audio(model):
    batch, _ = training_batch()
    text = {name: torch.arange(84)[None].clone() for name in ("input_ids", "labels", "position_ids")}
    both = {name: torch.cat([batch[name], text[name]]) for name in text}
    both |= {"audios": batch["audios"], "audio_indices": batch["audio_indices"]}
    model.train()
    items = 100
    together = model(**both, num_items_in_batch=items).loss
    with_audio = model(**batch, num_items_in_batch=items).loss
    without = model(**text, num_items_in_batch=items).loss
    torch.testing.assert_close(together, with_audio + without)


def test_a_step_without_audio_keeps_every_parameter_in_the_graph_exactly_once(model):
    calls = []
    model.model.audio_model.register_forward_hook(lambda module, args, output: calls.append(args))
    run_case(model, "no_audio_fake_branch")
    assert len(calls) == 1
    for name, parameter in model.named_parameters():
        if "audio_" in name and ".ctc." not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() == 0, name


def test_evaluation_without_audio_does_not_run_the_encoder(model):
    calls = []
    model.model.audio_model.register_forward_hook(lambda module, args, output: calls.append(args))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert not calls


def test_head_losses_do_not_reach_backbone_adapter_or_encoder(model):
    model.config.mtp_loss_weight = 3.0
    run_case(model, "mean_reduction")
    tripled = released_norms(model)
    expected = RUNS["mean_reduction"]["grad_l2_norms"]
    changed = set(
        json.loads((GOLDENS / "lm_train.json").read_text())[
            "params_whose_gradient_norm_changes_when_mtp_losses_are_removed"
        ]
    )
    for name, norm in expected.items():
        if norm is not None:
            same = abs(tripled[name] - norm) <= 1e-4 * norm + 1e-7
            assert same == (name not in changed), name


def test_a_frozen_encoder_stays_in_evaluation_mode_and_untouched(model):
    for dropout in model.model.audio_model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.5
    freeze_audio_encoder(model)
    model.train()
    assert model.model.audio_projection.training
    assert not any(module.training for module in model.model.audio_model.modules())
    batch, _ = training_batch()
    first = model(**batch)
    assert torch.equal(first.loss, model(**batch).loss)
    first.loss.backward()
    for name, parameter in model.named_parameters():
        assert ("model.audio_model." in name) == (not parameter.requires_grad)
        if "audio_projection" in name:
            assert parameter.grad.abs().max() > 0


def test_an_unfrozen_encoder_trains_with_dropout(model):
    model.train()
    assert all(module.training for module in model.model.audio_model.modules())


def test_gradient_checkpointing_changes_no_gradient(model):
    run_case(model, "mean_reduction")
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.model.audio_model.model.encoder.encoders[0].register_forward_pre_hook(lambda *args: calls.append(1))
    run_case(model, "mean_reduction")
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5)
    assert len(calls) == 2


def test_bfloat16_logits_are_near_those_of_float32(sensevoice_checkpoint, model):
    inputs, golden = evaluation_case("a")
    half = AutoModelForCausalLM.from_pretrained(sensevoice_checkpoint, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - golden["a_logits"]).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_indices": None}, "0 audio_indices"),
        ({"audio_indices": "first"}, "1 audio_indices"),
        ({"audio_indices": "swapped"}, r"audio_indices\[0\] names 6"),
        ({"inputs_embeds": torch.zeros(1, 49, 64)}, "inputs_embeds"),
    ],
)
def test_audio_that_does_not_fit_its_positions_is_refused(model, change, message):
    inputs, _ = evaluation_case("a")
    if change.get("audio_indices") == "first":
        change = {"audio_indices": inputs["audio_indices"][:1]}
    elif change.get("audio_indices") == "swapped":
        change = {"audio_indices": inputs["audio_indices"][::-1]}
    with pytest.raises(ValueError, match=message):
        model(**inputs | change)
