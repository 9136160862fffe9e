"""Options refuse what cannot work, in one line that says what to do."""

import json
from contextlib import nullcontext

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vita_audio.training.arguments import ArgumentError, DataArguments, ModelArguments, StageArguments


@pytest.fixture
def mix(tmp_path):
    path = tmp_path / "mix.yaml"
    path.write_text("dataset: {}\n")
    return str(path)


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="no such folder"):
        ModelArguments(model_name_or_path=str(tmp_path / "absent"))


def test_an_unknown_type_of_weights_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="--dtype int8: give"):
        ModelArguments(model_name_or_path=str(tmp_path), dtype="int8")


def test_freezing_the_model_without_heads_leaves_nothing_to_train(tmp_path):
    with pytest.raises(ArgumentError, match="nothing to train"):
        ModelArguments(model_name_or_path=str(tmp_path), language_model_freeze=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("audio_tokenizer_type", "opus", "use glm4voice, mel_vq"),
        ("dataset_name", "absent.yaml", "no such file"),
        ("model_max_length", 4, "too short"),
        ("max_error_share", 1.5, "between 0 and 1"),
        ("text_audio_interval_ratio", [1, 2], "--text_audio_interval_ratio: .* at least 3"),
        ("text_audio_interval_ratio", [1, 10, 4], "--text_audio_interval_ratio .* give pairs"),
    ],
)
def test_data_options_out_of_range_are_refused(mix, field, value, message):
    good = {"dataset_name": mix, "audio_tokenizer_type": "mel_vq"}
    DataArguments(**good)
    with pytest.raises(ArgumentError, match=message):
        DataArguments(**{**good, field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"zero_optimization": {"stage": 7}}, "DeepSpeed refuses it: .*stage"),
        ({"zero_optimization": {"stage": 2, "unknown": 1}}, "DeepSpeed refuses it: .*unknown"),
        ({"zero_optimization": 2}, "zero_optimization must be a JSON object"),
        ({"optimizer": None}, "optimizer must be a JSON object"),
        ({"optimizer": {"type": "Foo", "params": {}}}, "there is no optimizer Foo"),
        ({"optimizer": {"type": "SGD", "params": {}}}, "SGD is not tested with ZeRO"),
    ],
)
def test_a_config_that_deepspeed_would_refuse_late_is_refused_before_the_model_is_loaded(
    tmp_path, change, message
):
    good = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
    }
    file = tmp_path / "ds.json"
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
    }
    file.write_text("\ufeff" + json.dumps(good))
    StageArguments(**options, deepspeed=str(file))
    file.write_text(json.dumps(good | change))
    with pytest.raises(ArgumentError, match=message) as refused:
        StageArguments(**options, deepspeed=str(file))
    assert "\n" not in str(refused.value)
    file.write_text('{"gradient_clipping": 1, "gradient_clipping": 2}')
    with pytest.raises(ArgumentError, match="'gradient_clipping' is given twice"):
        StageArguments(**options, deepspeed=str(file))


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_are_not_compiled_under_zero3_whose_hooks_would_prevent_it(tmp_path, stage):
    options = {"output_dir": str(tmp_path), "max_steps": 1, "use_cpu": True, "report_to": "none"}
    auto = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    config = auto | {"train_batch_size": "auto", "zero_optimization": zero}
    refused = pytest.raises(ArgumentError, match="--torch_compile True: ZeRO-3")
    with refused if stage == 3 else nullcontext():
        StageArguments(**options, deepspeed=config, torch_compile=True)
    unset_hf_deepspeed_config()


def test_a_run_without_a_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="max_steps"):
        StageArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{", "not valid JSON")])
def test_a_deepspeed_config_that_cannot_be_read_is_named(tmp_path, content, message):
    config = tmp_path / "ds.json"
    if content is not None:
        config.write_text(content)
    with pytest.raises(ArgumentError, match=f"ds.json: {message}"):
        StageArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, deepspeed=str(config))


def test_head_rates_need_a_deepspeed_config_that_leaves_the_optimizer_to_us(tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    with pytest.raises(ArgumentError, match="no_optimizer"):
        StageArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            deepspeed=str(config),
            mtp_learning_rate_multiplier=10,
        )


@pytest.mark.parametrize("arguments", ["{bad", "nonsense", "[1]", '{"speed": 1}', {"speed": 1}, None])
def test_scheduler_arguments_that_do_not_fit_are_refused_in_one_line(tmp_path, arguments):
    with pytest.raises(ArgumentError, match=r"--lr_scheduler_kwargs .*fits --lr_scheduler_type") as refusal:
        StageArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            use_cpu=True,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs=arguments,
        )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("arguments", ['{"min_lr_rate": 0.2}', {"min_lr_rate": 0.2}])
def test_valid_scheduler_arguments_are_accepted(tmp_path, arguments):
    options = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": arguments}
    taken = StageArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, **options)
    assert taken.lr_scheduler_kwargs == {"min_lr_rate": 0.2}
