"""The flags of the published program: what they mean here, and which are refused."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vita_audio.training.arguments import ArgumentError, StageArguments
from vita_audio.training.command_line import parse_arguments
from vita_audio.training.served import OPTIONS

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "configs/models"
DEEPSPEED = REPOSITORY / "scripts/deepspeed"


@pytest.fixture(autouse=True)
def forget_deepspeed(monkeypatch):
    """transformers remembers a process's last DeepSpeed config while it lives."""
    monkeypatch.delenv("ROOT_PATH", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    unset_hf_deepspeed_config()


@pytest.fixture
def needed(tmp_path) -> list[str]:
    """The flags without which nothing runs."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((CONFIGS / "qwen2.5_7b_mtp1.json").read_text())
    (tmp_path / "mix.yaml").write_text("dataset: {}\n")
    return [
        *("--model_name_or_path", str(model)),
        *("--dataset_name", str(tmp_path / "mix.yaml")),
        *("--audio_tokenizer_type", "glm4voice"),
        *("--output_dir", str(tmp_path / "out")),
        *("--max_steps", "100"),
    ]


def refusal(words: list[str]) -> str:
    with pytest.raises(ArgumentError) as refused:
        parse_arguments(words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- transformers' options -----------------------------------------------------------------------------------


def test_every_option_of_the_installed_transformers_is_supported_or_refused():
    assert {field.name for field in fields(TrainingArguments)} - set(OPTIONS) == set()
    assert all(option.allowed is None or option.reason for option in OPTIONS.values())


def test_an_option_added_by_an_upgrade_is_refused_until_it_is_listed(needed, monkeypatch):
    monkeypatch.delitem(OPTIONS, "seed")
    assert refusal(needed).startswith("--seed 42: an option of this transformers version")


@pytest.mark.parametrize(
    "words",
    [
        "--label_smoothing_factor 0.1",
        "--optim adafactor",
        "--optim_args beta=1",
        "--resume_from_checkpoint checkpoint-10",
        "--save_only_model True",
        "--save_strategy best",
        "--save_strategy epoch",
        "--save_on_each_node True",
        "--train_sampling_strategy group_by_length",
        "--auto_find_batch_size True",
        "--eval_strategy steps",
        "--do_eval",
        "--do_train False",
        "--eval_on_start",
        "--load_best_model_at_end True",
        "--metric_for_best_model loss",
        "--push_to_hub True",
        "--hub_model_id somebody/something",
        "--neftune_noise_alpha 5.0",
        "--torch_compile_backend cudagraphs",
        "--torch_compile_mode reduce-overhead",
        "--use_liger_kernel True",
        "--fsdp full_shard",
        "--dataloader_drop_last True",
        "--dataloader_prefetch_factor 4",
        "--remove_unused_columns True",
        "--ignore_data_skip False",
        "--logging_nan_inf_filter True",
        "--average_tokens_across_devices False",
        "--logging_strategy epoch",
        "--use_cache True",
        "--enable_jit_checkpoint True",
        "--lr_scheduler_type reduce_lr_on_plateau",
        "--lr_scheduler_type steep",
        "--loss_average node",
    ],
)
def test_options_that_would_be_ignored_or_fail_are_refused_by_name(needed, words):
    flag, *value = words.split()
    assert refusal([*needed, flag, *value]).startswith(f"{flag} {value[0] if value else 'True'}: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--learning", "1"], "--learning"),  # no abbreviations
        (["--max_steps", "many"], "--max_steps"),
        (["--seed"], "--seed"),
        (["stray"], "['stray']"),
        (["--bf16", "perhaps"], "--bf16"),
    ],
)
def test_unreadable_input_is_refused_in_one_line(needed, words, message):
    assert message in refusal([*needed, *words])


@pytest.mark.parametrize(
    "words",
    [
        *(
            "--seed -1",
            "--seed 4294967296",
            "--learning_rate -1.0",
            "--learning_rate nan",
            "--learning_rate inf",
        ),
        *("--weight_decay -0.1", "--adam_beta1 1.0", "--adam_beta2 -0.1", "--adam_epsilon 0.0"),
        *("--max_grad_norm -1.0", "--max_grad_norm nan", "--warmup_steps inf", "--warmup_steps -5.0"),
        *("--gradient_accumulation_steps 0", "--gradient_accumulation_steps -1"),
        *("--per_device_train_batch_size 0", "--dataloader_num_workers -1", "--save_total_limit -1"),
        *("--save_steps 0.0", "--save_steps nan", "--logging_steps 0.0", "--ddp_timeout 0"),
        *("--mtp_learning_rate_multiplier nan", "--mtp_loss_weight nan", "--mtp_loss_weight -1.0"),
        *("--model_max_length 8", "--model_max_length 1000000000000"),
        *("--checkpointed_layers some", "--checkpointed_layers -1", "--checkpointed_layers 2"),
        *("--gpu_memory_gb 0.0", "--gpu_memory_gb nan", "--trace_steps -1"),
        *("--report_to a_tracker_that_nobody_has",),
    ],
)
def test_a_value_out_of_range_is_refused_before_anything_is_loaded(needed, words):
    assert refusal([*needed, *words.split()]).startswith(f"{words}: ")


def test_layers_chosen_by_the_plan_need_checkpointing_and_a_memory_to_fit(needed):
    auto = [*needed, "--use_cpu", "True", "--checkpointed_layers", "auto"]
    assert "also give --gradient_checkpointing True" in refusal(auto)
    auto += ["--gradient_checkpointing", "True"]
    assert "there is no GPU here; give --gpu_memory_gb" in refusal(auto)
    _, _, stage = parse_arguments([*auto, "--gpu_memory_gb", "24"])
    assert (stage.chooses_checkpointed_layers, stage.gpu_memory_bytes) == (True, 24e9)


def test_the_ends_of_the_ranges_are_accepted(needed):
    words = "--seed 4294967295 --learning_rate 0 --adam_beta1 0 --max_grad_norm 0 --save_total_limit 0"
    parse_arguments([*needed, *words.split(), "--save_strategy", "no", "--save_steps", "0"])


def test_a_json_file_that_gives_an_option_twice_or_is_too_deep_is_refused(tmp_path):
    for content, message in (
        ('{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ("[" * 100_000, "not valid JSON"),
    ):
        (tmp_path / "arguments.json").write_text(content)
        assert message in refusal([str(tmp_path / "arguments.json")])


def test_a_missing_flag_is_named(needed):
    assert "--model_name_or_path" in refusal(needed[2:])


def test_arguments_survive_being_copied(tmp_path):
    options = {"loss_average": "rank", "warmup_steps": 0.03, "lr_scheduler_type": "cosine"}
    config = str(DEEPSPEED / "ds_config_zero2.json")
    first = StageArguments(output_dir=str(tmp_path), max_steps=10, deepspeed=config, **options)
    second = replace(first, max_steps=20)
    assert second.lr_scheduler_type == "warmup_cosine"
    assert second.average_tokens_across_devices is False


# -- published flags ------------------------------------------------------------------------------------------

PUBLISHED = (
    "--log_level info --do_train --overwrite_output_dir --bf16 True --tf32 True --torch_dtype bfloat16 "
    "--num_train_epochs 1 --per_device_train_batch_size 1 --per_device_eval_batch_size 1 "
    "--gradient_accumulation_steps 16 --save_strategy steps --save_steps 0.1 --save_total_limit 2 "
    "--learning_rate 5.00e-5 --max_grad_norm 1.0 --weight_decay 0.1 --adam_beta1 0.9 --adam_beta2 0.95 "
    "--adam_epsilon 1e-8 --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --report_to tensorboard "
    "--model_max_length 2048 --gradient_checkpointing True --trust_remote_code False --ddp_timeout 7200 "
    "--ddp_backend nccl --attn_implementation flash_attention_2 --seed 42 --data_seed 42 --reset_attention_mask "
    "--reset_position_ids --create_attention_mask false --create_attention_mask_2d false --dataloader_num_workers 8 "
    "--language-model-freeze --audio-model-freeze --text-audio-interval-ratio 1 10 4 10 --mtp_model_lr_mult 1.00e1"
).split()


def published(needed: list[str]) -> list[str]:
    return [*needed, *PUBLISHED, "--deepspeed", str(DEEPSPEED / "ds_config_zero2_no_optimizer.json")]


def check_published(model, data, stage) -> None:
    assert model.dtype == "bfloat16"
    assert model.language_model_freeze
    assert data.text_audio_interval_ratio == [1, 10, 4, 10]
    assert data.model_max_length == 2048
    assert stage.overwrite_output_dir
    assert stage.mtp_learning_rate_multiplier == 10
    assert stage.get_warmup_steps(8000) == 240
    assert (stage.learning_rate, stage.weight_decay, stage.adam_beta2) == (5e-5, 0.1, 0.95)
    # The config's scheduler section decides, as in the published runs.
    assert stage.lr_scheduler_type == "warmup_cosine"
    assert stage.lr_scheduler_kwargs == {"warmup_min_ratio": 0, "cos_min_ratio": 0.1, "warmup_type": "log"}
    assert "scheduler" not in stage.deepspeed


def test_all_flags_of_a_published_script_are_understood(needed):
    check_published(*parse_arguments(published(needed)))


def test_dashes_and_underscores_mean_the_same(needed):
    words = published(needed)
    dashed = [word.replace("_", "-") if word.startswith("--") else word for word in words]
    underscored = [
        word.replace("-", "_").replace("__", "--", 1) if word.startswith("--") else word for word in words
    ]
    check_published(*parse_arguments(dashed))
    check_published(*parse_arguments(underscored))
    with_equals = [f"{needed[0]}={needed[1]}", *words[2:]]
    check_published(*parse_arguments(with_equals))


def test_a_json_file_of_arguments_replaces_the_flags(needed, tmp_path):
    words = published(needed)
    arguments: dict = {"--token": None, "tokenizer_name": None, "lr_scheduler_kwargs": {}}
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            arguments[name] = True
        elif isinstance(arguments[name], list):
            arguments[name].append(int(word))
        elif arguments[name] is not True:
            arguments[name] = [int(arguments[name]), int(word)]
        else:
            arguments[name] = word
    arguments |= {"save_steps": 0.1, "create_attention_mask": False, "max_steps": 100}
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(arguments))
    check_published(*parse_arguments([str(file)]))
    _, _, stage = parse_arguments([str(file), "--learning_rate", "1e-4"])
    assert stage.learning_rate == 1e-4, "flags after the file win"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("{", "not valid JSON"), ("[]", "must be a JSON object")],
)
def test_a_json_file_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "arguments.json"
    if content is not None:
        file.write_text(content)
    assert f"{file}: {message}" in refusal([str(file)])


@pytest.mark.parametrize(
    "words",
    [
        "--reset_attention_mask False",
        "--reset-position-ids false",
        "--create_attention_mask True",
        "--create_attention_mask_2d",
        "--trust_remote_code True",
        "--use_fast_tokenizer False",
        "--dataset_joint False",
        "--variable_length True",
        "--cross_dataset_joint False",
        "--model_revision v2",
        "--token abc",
        "--vision_model_name_or_path some/model",
        "--reset_position_ids perhaps",
    ],
)
def test_a_built_in_meaning_cannot_be_changed(needed, words):
    flag, *value = words.split()
    message = refusal([*needed, flag, *value])
    assert message.startswith(f"--{flag[2:].replace('-', '_')} {' '.join(value)}".rstrip() + ": ")


@pytest.mark.parametrize(
    "words",
    [
        "--dataset_joint True --variable_length False --cross_dataset_joint --use_fast_tokenizer True",
        "--low_cpu_mem_usage True --cache_dir /cache --model_revision main",
        "--vision_model_type none --image_size 448 --image_token_length 256 --max_num_frame 64 --max_fps 1",
        "--min_patch_grid 1 --max_patch_grid 12",
    ],
)
def test_flags_that_change_nothing_here_are_accepted(needed, words):
    parse_arguments([*needed, *words.split()])


def test_a_warm_up_ratio_is_a_share_of_the_steps_and_the_last_flag_counts(needed):
    _, _, stage = parse_arguments([*needed, "--warmup_steps", "50", "--warmup_ratio", "0.1"])
    assert stage.get_warmup_steps(100) == 10
    assert refusal([*needed, "--warmup_ratio", "3"]).startswith("--warmup_ratio 3: give a share")
    assert refusal([*needed, "--warmup_ratio", "some"]).startswith("--warmup_ratio some: give a share")


# -- model configs -------------------------------------------------------------------------------------------


def test_the_heads_are_those_of_the_model_unless_a_flag_says_otherwise(needed):
    assert parse_arguments(needed)[0].num_nextn_predict_layers == 1
    assert parse_arguments([*needed, "--num_nextn_predict_layers", "3"])[0].num_nextn_predict_layers == 3


@pytest.mark.parametrize("heads", [0, 1, 10])
def test_the_published_config_files_say_how_many_heads(needed, heads):
    for name in (f"somewhere/config_7B_mtp{heads}.json", str(CONFIGS / f"qwen2.5_7b_mtp{heads}.json")):
        model, _, _ = parse_arguments([*needed, "--config_name", name])
        assert model.num_nextn_predict_layers == heads


def test_a_folder_may_be_the_config(needed):
    model, _, _ = parse_arguments([*needed, "--config_name", needed[1], "--tokenizer_name", needed[1]])
    assert model.num_nextn_predict_layers == 1
    assert model.tokenizer_name_or_path == needed[1]


def test_a_config_of_another_model_is_refused(needed, tmp_path):
    small = str(CONFIGS / "qwen2.5_0.5b_mtp1.json")
    assert "hidden_size is 896, but 3584" in refusal([*needed, "--config_name", small])
    config = json.loads((CONFIGS / "qwen2.5_7b_mtp1.json").read_text()) | {"rope_theta": 10_000.0}
    other = tmp_path / "other.json"
    other.write_text(json.dumps(config))
    assert "rope_theta is 10000.0, but 1000000.0" in refusal([*needed, "--config_name", str(other)])
    assert "no such folder or JSON file" in refusal([*needed, "--config_name", "absent.json"])
    both = ["--config_name", "config_7B_mtp10.json", "--num_nextn_predict_layers", "1"]
    assert "has 10; give one of the two" in refusal([*needed, *both])


def test_sensevoice_is_looked_for_next_to_the_published_models(needed, tmp_path, monkeypatch):
    words = [*needed, "--audio_tokenizer_type", "sensevoice_glm4voice"]
    monkeypatch.setenv("ROOT_PATH", str(tmp_path))
    folder = tmp_path / "models/FunAudioLLM/SenseVoiceSmall"
    assert refusal(words) == f"--audio_model_name_or_path {folder}: no such folder; give SenseVoiceSmall's"
    folder.mkdir(parents=True)
    assert parse_arguments(words)[0].audio_model_name_or_path == str(folder)


# -- DeepSpeed -------------------------------------------------------------------------------------------------


def with_config(needed: list[str], tmp_path: Path, change, name: str = "zero2") -> list[str]:
    config = json.loads((DEEPSPEED / f"ds_config_{name}.json").read_text())
    change(config)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config))
    return [
        *needed,
        "--deepspeed",
        str(file),
        "--lr_scheduler_type",
        "cosine",
        "--warmup_ratio",
        "0.03",
        "--bf16",
        "True",
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "zero3",
            lambda config: config["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save"),
            "ZeRO-3 saves no weights",
        ),
        (
            "zero2",
            lambda config: config["optimizer"]["params"].pop("betas"),
            "has no optimizer.params.betas, so --adam_beta1 and --adam_beta2 would have no effect",
        ),
        ("zero2", lambda config: config.pop("bf16"), "has no bf16.enabled, so --bf16 would have no effect"),
        ("zero2", lambda config: config.pop("gradient_clipping"), "--max_grad_norm would have no effect"),
        (
            "zero2",
            lambda config: config["scheduler"].update(type="OneCycle"),
            "scheduler OneCycle is not supported",
        ),
        (
            "zero2",
            lambda config: config["scheduler"]["params"].update(warmup_num_steps=1000),
            "warmup_num_steps is not the 3 of --warmup_steps",
        ),
        (
            "zero2",
            lambda config: config["optimizer"]["params"].update(lr=1.0),
            "lr=1.0, but --learning_rate=",
        ),
    ],
)
def test_a_deepspeed_config_that_ignores_a_flag_is_refused(needed, tmp_path, name, change, message):
    assert message in refusal(with_config(needed, tmp_path, change, name))


def test_the_scheduler_section_defaults_to_the_values_of_deepspeed(needed, tmp_path):
    words = with_config(needed, tmp_path, lambda config: config["scheduler"]["params"].pop("cos_min_ratio"))
    assert parse_arguments(words)[2].lr_scheduler_kwargs["cos_min_ratio"] == 0.0001


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--lr_scheduler_type", "linear"], "linear"),
        (["--lr_scheduler_kwargs", '{"num_cycles": 0.5}'], "cosine"),
    ],
)
def test_a_requested_schedule_takes_precedence_over_the_section(needed, tmp_path, flags, kind):
    words = with_config(needed, tmp_path, lambda config: None)
    _, _, stage = parse_arguments([*words, *flags])
    assert stage.lr_scheduler_type == kind
    assert "scheduler" not in stage.deepspeed


def test_weight_decay_of_the_norms_must_be_requested(needed, tmp_path):
    words = [*with_config(needed, tmp_path, lambda config: None), "--weight_decay", "0.1"]
    assert "decays every parameter" in refusal(words)
    assert parse_arguments([*words, "--decay_norms", "True"])[2].decay_norms


def test_on_cpus_the_supported_options_are_chosen_and_reported(needed, caplog):
    flags = "--mtp_model_lr_mult 1 --weight_decay 0".split()
    config = str(DEEPSPEED / "ds_config_zero2.json")
    model, _, stage = parse_arguments([*published(needed), *flags, "--deepspeed", config])
    assert stage.use_cpu
    assert stage.ddp_backend is None
    assert stage.tf32 is None
    assert stage.deepspeed["optimizer"]["params"]["torch_adam"] is True
    assert model.attn_implementation == "sdpa"
    for replaced in (
        "PyTorch's Adam instead of DeepSpeed's, gloo instead of nccl, no tf32",
        "sdpa instead of",
    ):
        assert f"training on CPUs: {replaced}" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPU")
def test_missing_gpus_are_not_silently_replaced_by_cpus(needed, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert "--ddp_backend nccl: this machine has no visible NVIDIA GPU" in refusal(
        [*needed, "--ddp_backend", "nccl"]
    )
