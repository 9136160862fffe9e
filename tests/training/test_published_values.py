"""The recipe as published: one table, against what every script, config and model file resolves to."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vita_audio.training.arguments import StageArguments
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.deepspeed_config import read_deepspeed_config

REPOSITORY = Path(__file__).resolve().parents[2]

# Per stage: heads, frozen LLM, rate, heads' multiplier, weight decay, steps, mix, DeepSpeed config.
STAGES = {
    "stage1": (0, False, 6e-5, 1, 0.0, 8000, "sts_finetune_stage1.yaml", "ds_config_zero2.json"),
    "mtp1_stage1": (1, True, 1e-3, 1, 0.0, 4000, "sts_finetune_stage1.yaml", "ds_config_zero2.json"),
    "mtp10_stage1": (10, True, 1e-3, 1, 0.0, 8000, "sts_finetune_stage1.yaml", "ds_config_zero2.json"),
    "mtp10_stage2": (
        10,
        False,
        5e-5,
        10,
        0.1,
        4000,
        "sts_finetune_stage2.yaml",
        "ds_config_zero2_no_optimizer.json",
    ),
}
PREVIOUS = {"mtp1_stage1": "stage1", "mtp10_stage1": "mtp1_stage1", "mtp10_stage2": "mtp10_stage1"}
FAMILIES = ("glm4voice", "sensevoice_glm4voice")
SCRIPTS = [f"finetune_{family}_{stage}" for family in FAMILIES for stage in STAGES]


@pytest.fixture(autouse=True)
def forget_deepspeed(monkeypatch):
    """transformers remembers a process's last DeepSpeed config while it lives."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    unset_hf_deepspeed_config()


COMMON = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "warmup_cosine",
    "lr_scheduler_kwargs": {"cos_min_ratio": 0.1},
    "warmup_steps": 0.03,
    "bf16": True,
    "gradient_checkpointing": True,
    "seed": 42,
    "data_seed": 42,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "logging_steps": 1,
    "report_to": ["tensorboard"],
    "ddp_timeout": 7200,
    # Ours, with a switch each: docs/differences.md.
    "loss_average": "global",
    "decay_norms": False,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_resolves_to_the_published_values(stand_ins, script):
    plus = "sensevoice" in script
    family, stage = FAMILIES[plus], script.split("glm4voice_", 1)[1]
    heads, frozen, rate, multiplier, decay, steps, mix, deepspeed = STAGES[stage]
    results = stand_ins.root / "output/LM"
    if stage in PREVIOUS:
        (results / f"finetune_{family}_{PREVIOUS[stage]}/run").mkdir(parents=True)
    call = stand_ins.call(script, "8192", "run")
    model, data, training = parse_arguments(call.flags)

    assert model.num_nextn_predict_layers == heads
    assert model.language_model_freeze is frozen
    assert model.audio_model_freeze is True
    assert training.learning_rate == rate
    assert training.mtp_learning_rate_multiplier == multiplier
    assert training.weight_decay == decay
    assert training.max_steps == steps
    assert training.get_warmup_steps(steps) == steps * 3 // 100
    assert Path(data.dataset_name) == REPOSITORY / "configs" / mix
    assert Path(call.value("--deepspeed")) == REPOSITORY / "scripts/deepspeed" / deepspeed
    assert training.dataloader_num_workers == (2 if plus and stage == "mtp10_stage2" else 8)
    assert data.text_audio_interval_ratio == [1, 10, 4, 10]
    assert data.audio_tokenizer_type == family
    assert {name: getattr(training, name) for name in COMMON} == COMMON
    assert (call.value("--tf32"), call.value("--ddp_backend")) == ("True", "nccl")
    start = f"finetune_{family}_{PREVIOUS[stage]}/run" if stage in PREVIOUS else None
    assert Path(model.model_name_or_path) == (
        results / start if start else stand_ins.root / "models/Qwen/Qwen2.5-7B-Instruct"
    )
    sensevoice = str(stand_ins.root / "models/FunAudioLLM/SenseVoiceSmall")
    assert model.audio_model_name_or_path == (sensevoice if plus else None)


# -- DeepSpeed ---------------------------------------------------------------------------------------------

FP16 = {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
ADAMW = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
SCHEDULER = {
    "type": "WarmupCosineLR",
    "params": {
        "total_num_steps": "auto",
        "warmup_min_ratio": 0,
        "warmup_num_steps": "auto",
        "cos_min_ratio": 0.1,
    },
}


def offload(device: str) -> dict:
    return {f"offload_{what}": {"device": device, "pin_memory": True} for what in ("optimizer", "param")}


def buckets(stage: int, device: str) -> dict:
    switches = "allgather_partitions overlap_comm reduce_scatter contiguous_gradients".split()
    sizes = {"allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "sub_group_size": 1e12}
    # Published: true. DeepSpeed's universal format then returns the weights in another order (docs/differences.md).
    kept_order = {"round_robin_gradients": False}
    return {"stage": stage, **dict.fromkeys(switches, True), **kept_order, **sizes, **offload(device)}


def split(bucket: float, persistence: float, device: str) -> dict:
    return {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": persistence,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
        **offload(device),
    }


ZERO = {
    "zero1": buckets(1, "none"),
    "zero2": buckets(2, "none"),
    "zero2_no_optimizer": buckets(2, "none"),
    "zero2_offload": buckets(2, "cpu"),
    "zero3": split(1e9, 1e9, "none"),
    "zero3_offload": split(5e8, 1e5, "cpu"),
}


@pytest.mark.parametrize("name", ZERO)
def test_the_deepspeed_configs_hold_the_published_fields(name):
    config = json.loads((REPOSITORY / f"scripts/deepspeed/ds_config_{name}.json").read_text())
    sizes = (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    )
    assert {key: config[key] for key in sizes} == dict.fromkeys(sizes, "auto")
    assert config["steps_per_print"] == 100
    assert config["fp16"] == FP16
    assert config["bf16"] == {"enabled": "auto"}
    assert config.get("optimizer") == (None if name == "zero2_no_optimizer" else ADAMW)
    assert config["scheduler"] == SCHEDULER
    assert config["zero_optimization"] == ZERO[name]
    assert config.get("flops_profiler", {}).get("enabled") == (False if name == "zero3_offload" else None)


@pytest.mark.parametrize("name", ZERO)
def test_the_installed_deepspeed_takes_every_config(name, tmp_path):
    arguments = StageArguments(
        output_dir=str(tmp_path),
        max_steps=100,
        bf16=True,
        warmup_steps=0.03,
        deepspeed=str(REPOSITORY / f"scripts/deepspeed/ds_config_{name}.json"),
    )
    arguments.hf_deepspeed_config.trainer_config_finalize(arguments, None, 100)
    config = DeepSpeedConfig(arguments.hf_deepspeed_config.config)
    assert config.zero_config.stage == ZERO[name]["stage"]
    assert config.zero_config.round_robin_gradients is False
    assert config.zero_config.offload_param.device == ZERO[name]["offload_param"]["device"]
    assert config.bfloat16_config.enabled
    assert not config.float16_config.enabled
    if "optimizer" in arguments.deepspeed:
        assert config.optimizer_params["betas"] == [arguments.adam_beta1, arguments.adam_beta2]


@pytest.mark.parametrize("name", ["ds_config_zero2.json", "ds_config_zero2_no_optimizer.json"])
def test_the_configs_of_the_quickstart_differ_from_the_published_ones_in_no_value_that_affects_learning(name):
    """Bucket sizes and overlap may differ; they change no update but by rounding."""
    quickstart = read_deepspeed_config(str(REPOSITORY / "configs/quickstart" / name))
    assert quickstart["zero_optimization"]["stage"] == 2
    optimizer = quickstart.get("optimizer")
    if optimizer is not None:
        assert optimizer["params"].pop("torch_adam") is True
    assert optimizer == (ADAMW if name == "ds_config_zero2.json" else None)


# -- models ------------------------------------------------------------------------------------------------

QWEN = {  # hidden, intermediate, layers, attention heads, key-value heads, tied embeddings
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "3b": (2048, 11008, 36, 16, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}


@pytest.mark.parametrize("size", QWEN)
@pytest.mark.parametrize("heads", [0, 1, 10])
def test_the_model_configs_are_those_of_qwen_and_the_paper(size, heads):
    config = json.loads((REPOSITORY / f"configs/models/qwen2.5_{size}_mtp{heads}.json").read_text())
    hidden, intermediate, layers, attention_heads, key_value_heads, tied = QWEN[size]
    want = {
        "model_type": "qwen2_mtp",
        "vocab_size": 168072,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers + heads,
        "num_nextn_predict_layers": heads,
        "num_attention_heads": attention_heads,
        "num_key_value_heads": key_value_heads,
        "tie_word_embeddings": tied,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "hidden_act": "silu",
        "mtp_loss_weight": 1.0,
        "mtp_detach_backbone": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    }
    assert {key: config[key] for key in want} == want
