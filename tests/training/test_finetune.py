"""The training command, run in this process on a tiny model: its options reach the result."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.cli.finetune import main
from vita_audio.cli.launch import REFUSED
from vita_audio.models import load_with_heads

REPOSITORY = Path(__file__).resolve().parents[2]
CODES = 64  # speech tokens of the base model's tokenizer


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


@pytest.fixture
def finetune(tiny_world, tmp_path):
    """Train into ``tmp_path / name``; returns the folder."""

    def run(name="out", **options):
        main(tiny_world.options(tmp_path / name, **options))
        return tmp_path / name

    return run


@pytest.fixture
def refusal(finetune, capsys):
    """The message of a refused run."""

    def run(*args, **options):
        with pytest.raises(SystemExit) as exit_:
            finetune(*args, **options)
        assert exit_.value.code == REFUSED
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error.split("\nfinetune_sts: ")[-1].removeprefix("finetune_sts: ")

    return run


def read(folder, name="run.json"):
    return json.loads((folder / name).read_text())


def steps(folder):
    return [line for line in read(folder, "trainer_state.json")["log_history"] if "loss" in line]


def test_a_run_writes_a_model_folder_that_states_its_origin(finetune):
    folder = finetune(num_nextn_predict_layers=1, text_audio_interval_ratio=[1, 6, 2, 6], max_steps=2)
    run, config = read(folder), read(folder, "config.json")
    assert (folder / "stage.complete").is_file()
    assert run["arguments"]["learning_rate"] == 1e-3
    assert run["arguments"]["dtype"] == "float32"
    assert run["versions"]["torch"] == torch.__version__
    assert run["data"]["samples_per_epoch"] == 200
    assert read(folder / "checkpoint-2") == run
    assert config["use_cache"] is True
    card = (folder / "README.md").read_text()
    assert "backbone of 2 layers with 1 MCTP heads" in card
    assert "| Trained | language model and 1 heads |" in card
    assert run["data"]["fingerprint"] in card
    assert "| Default schedule | 1 6 2 6 |" in card
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in card


def test_the_vocabulary_grows_to_that_of_the_tokenizer_and_the_schedule_is_saved_with_the_model(
    finetune, tiny_world
):
    folder = finetune(
        num_nextn_predict_layers=2,
        text_audio_interval_ratio=[1, 4, 3, 8, 4, 10],
        mtp_loss_weight=0.25,
        max_steps=1,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size >= len(AutoTokenizer.from_pretrained(folder)) > 688
    assert model.generation_config.mtp_inference_mode == [1, 4, 3, 8, 4, 10]
    assert model.config.system_prompt == "", (
        "training adds no system message, so the model is asked without one"
    )
    assert model.config.mtp_loss_weight == 0.25


def test_a_folder_saved_without_cache_is_corrected(finetune, tiny_world, tmp_path):
    model = load_with_heads(tiny_world.root / "base", num_heads=0)
    model.config.use_cache = False
    model.save_pretrained(tmp_path / "old")
    AutoTokenizer.from_pretrained(tiny_world.root / "base").save_pretrained(tmp_path / "old")
    assert (
        read(finetune(model_name_or_path=tmp_path / "old", max_steps=1), "config.json")["use_cache"] is True
    )


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bf16": True}, torch.bfloat16),
        ({"bf16": False}, torch.float32),
        ({"bf16": True, "dtype": "float32"}, torch.float32),
    ],
)
def test_weights_are_trained_and_saved_in_the_requested_type(finetune, options, dtype):
    folder = finetune(max_steps=1, **options)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}


def test_training_in_bfloat16_lowers_the_loss(finetune):
    losses = [line["loss"] for line in steps(finetune(bf16=True, max_steps=12, learning_rate=1e-2))]
    assert losses[-1] < losses[0] - 0.5


def test_the_data_seed_alone_orders_the_rows(finetune):
    by_seed = {
        (seed, data_seed): [
            line["loss"]
            for line in steps(finetune(f"{seed}-{data_seed}", seed=seed, data_seed=data_seed, max_steps=1))
        ]
        for seed, data_seed in ((1, 1), (1, 2))
    }
    assert by_seed[1, 1] != by_seed[1, 2]
    fingerprints = {
        read(finetune(f"{seed}-7", seed=seed, data_seed=7, max_steps=1))["data"]["fingerprint"]
        for seed in (1, 2)
    }
    assert len(fingerprints) == 1


def test_strict_data_refuses_a_mix_of_which_a_file_is_missing(finetune, refusal, tiny_world):
    mix = tiny_world.root / "half.yaml"
    mix.write_text("dataset:\n  text: {data_paths: [text.jsonl]}\n  lost: {data_paths: [lost.jsonl]}\n")
    finetune("lenient", dataset_name=mix, max_steps=1)
    assert "lost.jsonl" in refusal("strict", dataset_name=mix, strict_data=True)


def test_old_checkpoints_are_deleted_once_the_new_one_is_complete(finetune):
    folder = finetune(max_steps=6, save_steps=2, save_total_limit=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("freeze", [None, True, False])
def test_the_sensevoice_encoder_is_frozen_unless_requested_otherwise(finetune, plus_model, caplog, freeze):
    caplog.set_level(logging.INFO)
    finetune(
        model_name_or_path=plus_model,
        audio_tokenizer_type="sensevoice_glm4voice",
        audio_model_name_or_path=REPOSITORY / "tests" / "goldens" / "sensevoice",
        num_nextn_predict_layers=json.loads((plus_model / "config.json").read_text())[
            "num_nextn_predict_layers"
        ],
        audio_model_freeze=freeze,
        max_steps=1,
    )
    encoder, of_encoder = re.search(r"audio encoder: (\S+) of (\S+) parameters", caplog.text).groups()
    adapter, of_adapter = re.search(r"audio adapter: (\S+) of (\S+) parameters", caplog.text).groups()
    assert encoder == (of_encoder if freeze is False else "0")
    assert adapter == of_adapter != "0"


@pytest.fixture(scope="module")
def plus_model(tiny_world):
    """The golden Plus model, with the golden tokenizer of that family."""
    goldens, folder = REPOSITORY / "tests" / "goldens", tiny_world.root / "plus"
    AutoTokenizer.from_pretrained(goldens / "data/tokenizer/sensevoice_glm4voice").save_pretrained(folder)
    goldens /= "sensevoice"
    config = json.loads((goldens / "lm_config.json").read_text())
    config |= {"model_type": "qwen2_mtp_sensevoice", "architectures": ["Qwen2MTPSenseVoiceForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(goldens / "lm_weights.safetensors", folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(688)
    model.save_pretrained(folder)
    return folder


# -- going on ------------------------------------------------------------------------------------------------


def test_a_finished_stage_returns_at_once_and_continues_when_max_steps_is_raised(finetune, caplog):
    folder = finetune(max_steps=2)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    finetune(max_steps=2)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    finetune(max_steps=4)
    assert [line["step"] for line in steps(folder)] == [1, 2, 3, 4]
    assert (folder / "stage.complete").is_file()
    assert read(folder)["resumed_from"] == "checkpoint-2"


def test_changed_options_apply_after_a_resume_and_each_change_is_logged(finetune, caplog):
    folder = finetune(max_steps=4, lr_scheduler_type="constant")
    caplog.clear()
    finetune(
        max_steps=6,
        lr_scheduler_type="constant",
        learning_rate=1e-5,
        weight_decay=0.5,
        adam_beta2=0.9,
        save_steps=1,
        seed=7,
        data_seed=42,
    )
    assert [line["learning_rate"] for line in steps(folder)] == [1e-3] * 4 + [1e-5] * 2
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in (2, 4, 5, 6)
    ]
    (group,) = {
        (group["lr"], group["betas"], group["weight_decay"])
        for group in torch.load(folder / "checkpoint-6" / "optimizer.pt")["param_groups"]
        if group["weight_decay"]
    }
    assert group == (1e-5, (0.9, 0.9), 0.5)
    for said in (
        "--learning_rate 1e-05 (was 0.001) applies from here on",
        "--weight_decay 0.5 (was 0) applies from here on",
        "--adam_beta2 0.9 (was 0.999) applies from here on",
        "--save_steps 1 (was 2) applies from here on",
        "--max_steps 6 (was 4) applies from here on",
        "--seed 7 (was 42) has no effect",
    ):
        assert said in caplog.text
    assert "do not match the ones in the `trainer_state.json`" not in caplog.text


def test_a_lower_rate_follows_the_schedule_at_the_step_it_resumes_from(finetune):
    folder = finetune("resumed", max_steps=8, save_steps=4, lr_scheduler_type="linear")
    (folder / "stage.complete").unlink()
    for late in ("checkpoint-8",):
        (folder / late / "checkpoint.complete").unlink()
    finetune("resumed", max_steps=8, save_steps=4, lr_scheduler_type="linear", learning_rate=1e-4)
    rates = [line["learning_rate"] for line in steps(folder)]
    assert rates == pytest.approx(
        [1e-3 * (1 - n / 8) for n in range(4)] + [1e-4 * (1 - n / 8) for n in range(4, 8)]
    )


def test_a_resume_without_changes_logs_nothing_and_gives_the_losses_of_an_uninterrupted_run(finetune, caplog):
    whole = finetune("whole", max_steps=4)
    resumed = finetune("resumed", max_steps=4)
    (resumed / "stage.complete").unlink()
    (resumed / "checkpoint-4" / "checkpoint.complete").unlink()
    caplog.clear()
    finetune("resumed", max_steps=4)
    assert "(was" not in caplog.text
    keys = ("step", "loss", "learning_rate", "epoch")
    assert [[line[key] for key in keys] for line in steps(resumed)] == [
        [line[key] for key in keys] for line in steps(whole)
    ]


@pytest.mark.parametrize(
    "changed",
    [{"num_nextn_predict_layers": 1}, {"bf16": True}, {"audio_tokenizer_type": "mel_vq"}],
)
def test_a_change_that_a_checkpoint_does_not_allow_is_refused_by_name(finetune, refusal, changed, tmp_path):
    finetune(max_steps=2)
    if "audio_tokenizer_type" in changed:
        config = MelVQConfig(codebook_size=CODES)
        heard = torch.rand(CODES, config.patch_frames * config.mels)
        codec = MelVQTokenizer(
            config, heard, torch.rand(CODES, config.patch_frames, config.fft_size // 2 + 1)
        )
        codec.save_pretrained(tmp_path / "codec")
        changed = {**changed, "audio_tokenizer_path": tmp_path / "codec"}
    message = refusal(max_steps=4, **changed)
    assert message.startswith(f"--{next(iter(changed))} ")
    assert "checkpoint-2 cannot be continued with it" in message


def test_another_data_seed_is_refused_before_the_model_is_loaded(finetune, refusal, monkeypatch):
    finetune(max_steps=2)
    monkeypatch.setattr("vita_audio.cli.finetune.load_with_heads", None)
    assert "another data mix or seed" in refusal(max_steps=4, data_seed=1)


def test_epochs_are_counted_by_the_loader_also_after_a_resume(finetune):
    folder = finetune(max_steps=2)
    finetune(max_steps=4)
    lines = steps(folder)
    assert [line["epoch"] for line in lines] == [line["data/epoch"] for line in lines]
    assert 0 < lines[1]["epoch"] <= lines[2]["epoch"] < 1


def test_tensorboard_shows_one_run_and_each_step_once(finetune):
    folder = finetune(max_steps=4, report_to="tensorboard", save_steps=2)
    (folder / "checkpoint-4" / "checkpoint.complete").unlink()
    (folder / "stage.complete").unlink()
    finetune(max_steps=6, report_to="tensorboard", save_steps=2)
    assert [path.name for path in folder.rglob("events*") if path.parent != folder / "runs"] == []
    events = EventAccumulator(str(folder / "runs")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_the_progress_bar_starts_where_the_run_resumes(finetune, monkeypatch):
    from vita_audio.training import callbacks

    bars = []

    class Bar(callbacks.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(callbacks, "tqdm", Bar)
    finetune(max_steps=2, disable_tqdm=False)
    finetune(max_steps=5, disable_tqdm=False)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 2, 2), (2, 5, 5)]


def test_overwriting_the_output_folder_starts_over(finetune):
    folder = finetune(max_steps=4)
    finetune(max_steps=2, overwrite_output_dir=True)
    assert [line["step"] for line in steps(folder)] == [1, 2]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


# -- refusals ------------------------------------------------------------------------------------------------


def test_an_unfinished_stage_is_not_taken_as_input(finetune, refusal):
    folder = finetune("first", max_steps=2)
    (folder / "stage.complete").unlink()
    message = refusal("second", model_name_or_path=folder)
    assert "this stage is not finished; complete it first" in message
    finetune("third", model_name_or_path=folder / "checkpoint-2", max_steps=1)


def test_deepspeed_without_a_launcher_is_refused_with_the_command_to_use(refusal, tiny_world):
    config = tiny_world.environment()["DEEPSPEED_CONFIG"]
    assert "--deepspeed needs a launcher: python vita_audio/cli/launch.py" in refusal(deepspeed=config)


def test_wrong_options_are_reported_without_the_list_of_all_options(refusal):
    assert "lerning_rate" in refusal(lerning_rate=1)
    assert "--max_steps" in refusal(max_steps="many")


def test_missing_hardware_is_reported_before_the_model_is_loaded(refusal, monkeypatch):
    monkeypatch.setattr("vita_audio.cli.finetune.load_with_heads", None)
    if not torch.cuda.is_available():
        assert "--ddp_backend nccl: this machine has no visible NVIDIA GPU" in refusal(
            ddp_backend="nccl", use_cpu=None
        )
    assert "flash_attention_2 needs" in refusal(attn_implementation="flash_attention_2", use_cpu=None)


def test_a_missing_codec_is_reported_before_the_model_is_loaded_if_the_mix_has_speech(
    finetune, refusal, tiny_world, monkeypatch
):
    spoken = {
        "messages": [{"role": "user", "content": "<|audio|>"}, {"role": "assistant", "content": "yes"}],
        "audios": ["a.wav"],
    }
    (tiny_world.root / "spoken.jsonl").write_text(json.dumps(spoken) + "\n")
    mix = tiny_world.root / "spoken.yaml"
    mix.write_text("dataset: {text: {data_paths: [text.jsonl]}, asr: {data_paths: [spoken.jsonl]}}\n")
    finetune("text", audio_tokenizer_path=tiny_world.root / "no_codec", max_steps=1)
    monkeypatch.setattr("vita_audio.cli.finetune.load_with_heads", None)
    message = refusal("spoken", dataset_name=mix, audio_tokenizer_path=tiny_world.root / "no_codec")
    assert "no_codec: no such folder, and the mix contains speech" in message


def test_a_folder_of_another_codec_is_reported_before_the_model_is_loaded(refusal, tiny_world, monkeypatch):
    monkeypatch.setattr("vita_audio.cli.finetune.load_with_heads", None)
    message = refusal(audio_tokenizer_path=tiny_world.root / "base")
    assert str(tiny_world.root / "base") in message


def test_a_result_without_weights_is_not_called_complete(finetune, refusal, monkeypatch):
    from vita_audio.training import SpeechTrainer

    save = SpeechTrainer.save_model

    def save_without_weights(self, output_dir=None, **kwargs):
        save(self, output_dir, **kwargs)
        if output_dir is None:
            weights = load_file(f"{self.args.output_dir}/model.safetensors")
            from safetensors.torch import save_file

            save_file(
                {name: weight for name, weight in weights.items() if name != "model.norm.weight"},
                f"{self.args.output_dir}/model.safetensors",
            )

    monkeypatch.setattr(SpeechTrainer, "save_model", save_without_weights)
    message = refusal(max_steps=1)
    assert "1 of 27 weights were not saved correctly" in message


def _torn(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tiny_world):
    """A stage of two steps."""
    folder = tiny_world.root / "finished"
    main(tiny_world.options(folder, max_steps=2))
    return folder


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("optimizer.pt", Path.unlink, "optimizer.pt: not found"),
        ("optimizer.pt", _torn, "optimizer.pt: damaged or truncated"),
        ("optimizer.pt", _flipped, "optimizer.pt: damaged or truncated"),
        ("scheduler.pt", _torn, "scheduler.pt: damaged or truncated"),
        ("rng_state.pth", _flipped, "rng_state.pth: damaged or truncated"),
        ("model.safetensors", Path.unlink, "weight files are missing"),
        ("model.safetensors", _torn, "truncated"),
        ("config.json", Path.unlink, "config.json: not found"),
        (
            "loader_state/rank_00000.json",
            lambda file: file.write_text("[1]"),
            "the place in the data is damaged",
        ),
        ("loader_state/rank_00000.json", lambda file: file.write_text('{"version": 1}'), "data is damaged"),
        (
            "loader_state/rank_00000.json",
            lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | {"loader": {}})),
            "the place in the data is damaged",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_before_the_model_is_loaded(
    finished, finetune, refusal, tmp_path, monkeypatch, name, damage, said
):
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run" / "checkpoint-2" / name)
    monkeypatch.setattr("vita_audio.cli.finetune.load_with_heads", None)
    message = refusal("run", max_steps=3)
    assert said in message
    assert "to continue from the one before it" in message
    assert message.count("\n") == 1


def test_a_checkpoint_that_the_reader_refuses_is_named(finished, refusal, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    torch.save({"state": 1}, tmp_path / "run" / "checkpoint-2" / "optimizer.pt")
    message = refusal("run", max_steps=3)
    assert "checkpoint-2: cannot be loaded: " in message
    assert "delete it to continue from the one before it" in message


@pytest.mark.parametrize("name", ["run.json", "stage.complete", "model.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_reported_in_one_line(refusal, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    assert "irectory" in refusal(max_steps=1, save_strategy="no")


def test_a_model_is_not_trained_into_its_own_folder(tiny_world, refusal, tmp_path):
    shutil.copytree(tiny_world.root / "base", tmp_path / "own")
    assert "is the folder of --model_name_or_path" in refusal("own", model_name_or_path=tmp_path / "own")
