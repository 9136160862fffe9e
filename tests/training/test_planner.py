"""The plan of a stage against the model itself: operations as torch counts them, memory as DeepSpeed keeps it."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from sizes import SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from vita_audio.cli import plan_run
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM
from vita_audio.models.compat import enable_checkpointing
from vita_audio.models.cost import PROJECTIONS
from vita_audio.training import step_memory
from vita_audio.training.lora import insert_adapters
from vita_audio.training.lora_arguments import LoraArguments
from vita_audio.training.optimizers import EIGHT_BIT_MOMENTS
from vita_audio.training.planner import Setup, Zero, make_plan, plan_within, step_flops
from vita_audio.training.recomputation import recompute_first
from vita_audio.training.stages import apply_stage
from vita_audio.training.step_memory import Batch

CONFIG = Qwen2MTPConfig(**SIZES)


def flop_counter():
    """torch's counter, which does not know a product that is added in place."""

    def added(_, left, right, **kwargs):
        return 2 * left[0] * left[1] * right[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})


EVERY = list(itertools.product((False, True), (0, 1, 4, None), (1, 3)))


@pytest.mark.parametrize(("frozen", "layers", "documents"), EVERY)
def test_operations_of_a_step_equal_torchs_count(frozen, layers, documents):
    model = Qwen2MTPForCausalLM(CONFIG).train()
    apply_stage(model, language_model_freeze=frozen)
    enable_checkpointing(model)
    if layers is not None:
        recompute_first(model, layers)
    positions = (torch.arange(documents * 16) % 16)[None]
    ids = torch.randint(96, positions.shape)
    labels = ids.masked_fill(positions < 8, -100)
    # torch counts no fused kernel of the CPU.
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        model(ids, position_ids=positions, labels=labels).loss.backward()
    batch = Batch(1, documents * 16, 16, supervised=0.5)
    setup = Setup(language_model_freeze=frozen, batch=batch, checkpointed_layers=layers)
    needed, recomputed = step_flops(CONFIG, setup)
    assert needed + recomputed == counter.get_total_flops()
    assert bool(recomputed) is (layers != 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [list(PROJECTIONS), ["q_proj", "v_proj"]])
def test_operations_of_a_step_with_adapters_equal_torchs_count(checkpointing, targets):
    lora = LoraArguments(lora_r=3, lora_target_modules=targets, lora_train_embeddings=True)
    model = Qwen2MTPForCausalLM(CONFIG).train()
    apply_stage(model)
    wrapped = insert_adapters(model, lora)
    if checkpointing:
        enable_checkpointing(model)
    ids = torch.randint(96, (1, 16))
    with sdpa_kernel(SDPBackend.MATH), flop_counter() as counter:
        wrapped(input_ids=ids, labels=ids.masked_fill(torch.arange(16) < 8, -100)).loss.backward()
    layers = None if checkpointing else 0
    setup = Setup(batch=Batch(1, 16, 16, supervised=0.5), checkpointed_layers=layers, lora=lora)
    assert sum(step_flops(CONFIG, setup)) == counter.get_total_flops()


@pytest.mark.parametrize("train_embeddings", [False, True])
def test_adapters_are_what_the_plan_counts_trains_and_saves(train_embeddings):
    lora = LoraArguments(lora_r=3, lora_train_embeddings=train_embeddings)
    model = Qwen2MTPForCausalLM(CONFIG)
    apply_stage(model)
    wrapped = insert_adapters(model, lora)
    setup = Setup(gpus=1, batch=Batch(1, 32, 32), lora=lora, dtype=torch.float32)
    plan = make_plan(CONFIG, setup, Zero())
    trained = sum(each.numel() for each in wrapped.parameters() if each.requires_grad)
    assert plan.trained == trained
    assert sum(every for _, every in plan.parameters.values()) == sum(
        each.numel() for each in wrapped.parameters()
    )
    assert plan.result_bytes == 4 * trained
    assert plan.states["optimizer"] == 12 * trained
    whole = make_plan(CONFIG, replace(setup, lora=None), Zero())
    assert plan.peak_bytes < whole.peak_bytes
    eight_bit = make_plan(CONFIG, replace(setup, moments=EIGHT_BIT_MOMENTS), Zero())
    assert eight_bit.states["optimizer"] < 0.6 * plan.states["optimizer"]


def test_activations_grow_with_tokens_and_checkpointing_saves_most_of_them():
    config = Qwen2MTPConfig(**{**SIZES, "hidden_size": 64, "num_hidden_layers": 10})
    peaks = {
        (length, checkpointing): step_memory.step_memory(
            config,
            Batch(1, length, length),
            language_model_freeze=False,
            dtype=torch.float32,
            checkpointed_layers=None if checkpointing else 0,
            held_gradient=0,
        )[0]
        for length in (128, 256)
        for checkpointing in (False, True)
    }
    assert peaks[128, True] < peaks[128, False] / 2
    assert 1.8 < peaks[256, False] / peaks[128, False] < 2.2


@pytest.mark.parametrize("frozen", [False, True])
def test_fewer_recomputed_layers_take_the_planned_memory_and_give_the_same_gradients(frozen):
    """The storages of a real step, added up as the plan adds up those of a step without data."""
    config = Qwen2MTPConfig(
        **{**SIZES, "hidden_size": 64, "num_hidden_layers": 8, "num_nextn_predict_layers": 4}
    )
    batch = Batch(1, 256, 64, supervised=0.5)
    measured, gradients = {}, {}
    for layers in (0, 2, 4):
        torch.manual_seed(0)
        model = Qwen2MTPForCausalLM(config).train()
        apply_stage(model, language_model_freeze=frozen)
        enable_checkpointing(model)
        recompute_first(model, layers)
        live = step_memory._LiveBytes()
        live.keep(model)
        with live:
            step_memory._pass(model, batch).backward()
        setup = Setup(language_model_freeze=frozen, batch=batch, dtype=torch.float32, gpus=1, accumulation=1)
        setup = replace(setup, checkpointed_layers=layers, device="cpu")
        plan = make_plan(config, setup, Zero(stage=0))
        assert live.peak == pytest.approx(sum(plan.backward.values()), rel=0.1)
        measured[layers] = live.peak
        gradients[layers] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert measured[0] > measured[2] > measured[4]
    for one, other in zip(gradients[0], gradients[2], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("frozen", "device", "layers"), [(False, "cpu", 5), (True, "cuda", 2)])
def test_as_few_layers_as_fit_the_memory_recompute_their_activations(frozen, device, layers):
    setup = Setup(language_model_freeze=frozen, batch=Batch(1, 256, 64), device=device, gpus=1)
    peaks = [
        make_plan(CONFIG, replace(setup, checkpointed_layers=count), Zero()).peak_bytes
        for count in range(layers + 1)
    ]
    assert peaks == sorted(peaks, reverse=True)
    cuda_itself = 2e9 if device == "cuda" else 0
    for count in (1, layers):
        plan = plan_within(CONFIG, setup, Zero(), (peaks[count] + cuda_itself) / 0.9 + 1)
        assert (plan.recomputed_layers, plan.layers, plan.peak_bytes) == (count, layers, peaks[count])
    assert plan_within(CONFIG, setup, Zero(), 1000).recomputed_layers == layers, "too little for any"


def test_a_head_that_recomputes_keeps_few_tensors_of_its_row_and_one_that_does_not_many():
    row = 512 * 64 * 4  # (time, d) in float32
    for layers, fewest, most in ((None, 3, 5), (0, 12, 20)):
        peaks = []
        for heads in (2, 6):
            sizes = {"hidden_size": 64, "num_hidden_layers": 1 + heads, "num_nextn_predict_layers": heads}
            config = Qwen2MTPConfig(**SIZES | sizes)
            batch = Batch(1, 512, 512, supervised=0.02)
            settings = {"language_model_freeze": True, "dtype": torch.float32, "held_gradient": 0.0}
            peaks.append(step_memory.step_memory(config, batch, **settings, checkpointed_layers=layers)[0])
        assert fewest < (peaks[1] - peaks[0]) / 4 / row < most


def test_gradients_of_earlier_batches_stand_beside_the_activations():
    settings = {"language_model_freeze": False, "dtype": torch.float32, "held_gradient": 1.0}
    batch = Batch(1, 64, 64)
    alone, gradients = step_memory.step_memory(CONFIG, batch, **settings)
    added, _ = step_memory.step_memory(CONFIG, batch, **settings, earlier_gradients=True)
    model = Qwen2MTPForCausalLM(CONFIG)
    assert gradients == sum(parameter.nbytes for parameter in model.parameters())
    assert alone < added <= alone + gradients


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_gpus_hold_less_each_as_the_zero_stage_says(stage):
    plans = [
        make_plan(CONFIG, Setup(gpus=gpus, batch=Batch(1, 32, 32)), Zero(stage=stage)) for gpus in (1, 4)
    ]
    assert plans[0].states["optimizer"] == 4 * plans[1].states["optimizer"] == 12 * plans[0].trained
    ratio = plans[0].backward["gradients"] / plans[1].backward["gradients"]
    assert ratio == pytest.approx(4 if stage > 1 else 1, rel=0.01)
    assert (plans[0].states["weights"] > plans[1].states["weights"]) is (stage == 3)
    assert plans[1].flops_per_step == 4 * plans[0].flops_per_step
    assert plans[1].hours(1e12, 0.5) == plans[0].hours(1e12, 0.5)


def test_a_run_with_zero3_plans_itself_though_transformers_would_partition_every_model_it_makes():
    setup = Setup(gpus=4, batch=Batch(1, 32, 32), checkpointed_layers=1)
    alone = make_plan(CONFIG, setup, Zero(stage=3))
    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled(), active
    try:
        assert make_plan(CONFIG, setup, Zero(stage=3)) == alone
    finally:
        unset_hf_deepspeed_config()


def test_a_frozen_backbone_has_no_optimizer_states():
    plan = make_plan(CONFIG, Setup(language_model_freeze=True, gpus=1, batch=Batch(1, 32, 32)), Zero())
    heads = plan.parameters["heads"][0]
    assert plan.parameters["language model"][0] == 0
    assert plan.states["optimizer"] == 12 * heads
    assert plan.trained == heads


@pytest.mark.parametrize(
    "name", ["zero1", "zero2", "zero2_no_optimizer", "zero2_offload", "zero3", "zero3_offload"]
)
def test_every_published_deepspeed_config_can_be_planned(name):
    file = plan_run.REPOSITORY / f"scripts/deepspeed/ds_config_{name}.json"
    zero = Zero.from_config(plan_run.read_deepspeed_config(str(file)))
    assert zero.stage == int(name[4])
    assert zero.offload_optimizer is name.endswith("offload")
    plan = make_plan(CONFIG, Setup(batch=Batch(1, 32, 32)), zero)
    assert (plan.host_bytes > 0) is name.endswith("offload")
    assert ("optimizer" in plan.states and plan.states["optimizer"] == 0) is name.endswith("offload")


def test_the_command_prints_the_published_stage_and_a_larger_row_costs_more(capsys):
    small = str(plan_run.REPOSITORY / "configs/models/qwen2.5_0.5b_mtp0.json")
    shown = {}
    for seq in (1024, 2048):
        plan_run.main(["--stage", "3", "--config", small, "--gpus", "4", "--seq", str(seq)])
        shown[seq] = capsys.readouterr().out
        assert f"{4 * 16 * seq:,} tokens" in shown[seq]
        assert "8,000 steps" in shown[seq]
    assert shown[1024].splitlines()[3].split()[:3] == ["language", "model", "0"]
    peaks = [float(text.split("\n  peak")[1].split()[0]) for text in shown.values()]
    assert peaks[0] < peaks[1]


def test_numbers_that_make_no_plan_are_refused_in_one_line(capsys):
    for wrong in (["--gpus", "0"], ["--mfu", "2"], ["--supervised", "0"]):
        with pytest.raises(SystemExit):
            plan_run.main(wrong)
        assert capsys.readouterr().err.startswith(f"error: {wrong[0]}")


@pytest.mark.slow
def test_planned_memory_is_within_a_tenth_of_what_deepspeed_takes():
    """Two of the sixteen cases of docs/planning.md, with the same command."""
    command = [sys.executable, str(plan_run.REPOSITORY / "tools/benchmark.py"), "memory"]
    run = subprocess.run(
        [*command, "--sizes", "256", "--stages", "2", "4"],
        env={**os.environ, "PYTHONPATH": str(plan_run.REPOSITORY), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=500,
    )
    cases = json.loads(run.stdout.splitlines()[-1])
    assert [case["stage"] for case in cases] == [2, 4]
    for case in cases:
        assert case["planned"] == pytest.approx(case["measured"], rel=0.1), case
