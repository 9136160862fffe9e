"""DRY_RUN=1 before a stage script: what it prints, against the published tables, and that nothing is started."""

import csv
import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vita_audio.cli import dry_run

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "tests/goldens/recipe"
STAGES = REPOSITORY / "scripts/deepspeed/sts_qwen25"
SMALL = {
    "model_type": "qwen2_mtp",
    "vocab_size": 688,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "dtype": "bfloat16",
}


def table(name: str) -> list[dict[str, str]]:
    with open(RECIPE / name, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


PUBLISHED = {row["script"]: row for row in table("stages.tsv")}
PREVIOUS = {"mtp1_stage1": "stage1", "mtp10_stage1": "mtp1_stage1", "mtp10_stage2": "mtp10_stage1"}
FAMILIES = ("glm4voice", "sensevoice_glm4voice")


@pytest.fixture(autouse=True)
def forget_deepspeed(monkeypatch):
    """transformers remembers a process's last DeepSpeed config while it lives."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    unset_hf_deepspeed_config()


def printed(call, capsys, monkeypatch) -> tuple[int, str]:
    """What the dry run of a noted call prints, with the environment that it was called in."""
    assert call.words[:2] == ["-m", "vita_audio.cli.dry_run"], call.printed
    for name in set(os.environ) - set(call.environment) - {"PATH", "HOME", "ACCELERATE_USE_CPU"}:
        monkeypatch.delenv(name)
    for name, value in call.environment.items():
        monkeypatch.setenv(name, value)
    status = 0
    try:
        dry_run.main(call.words[2:])
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().out


def values(text: str) -> dict[str, tuple[str, str]]:
    """The hyperparameters that were printed: value and source."""
    part = text.split("\nhyperparameters\n")[1].split("\n\n")[0]
    lines = [re.fullmatch(r"  (\w+) +(.*?)  \((.*)\)", line) for line in part.splitlines()]
    return {line[1]: (line[2], line[3]) for line in lines}


def sections(text: str) -> dict[str, list[str]]:
    parts = [part.splitlines() for part in text.split("\n\n")]
    return {lines[0].strip(): [line.strip() for line in lines[1:]] for lines in parts}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", PUBLISHED)
def test_a_dry_run_of_every_script_shows_the_published_values(stand_ins, capsys, monkeypatch, family, stage):
    plus, published = family != "glm4voice", PUBLISHED[stage]
    start = stand_ins.root / "models/Qwen/Qwen2.5-7B-Instruct"
    if stage in PREVIOUS:
        start = stand_ins.root / f"output/LM/finetune_{family}_{PREVIOUS[stage]}/run"
        start.mkdir(parents=True)
    (start / "config.json").write_text(json.dumps(SMALL))
    call = stand_ins.call(f"finetune_{family}_{stage}", "8192", "run", DRY_RUN="1")
    status, text = printed(call, capsys, monkeypatch)
    shown, found = values(text), sections(text)

    for name in (
        *("num_nextn_predict_layers", "language_model_freeze", "learning_rate", "max_steps"),
        *("mtp_learning_rate_multiplier", "weight_decay"),
    ):
        value, source = shown[name]
        assert value == published[name] or float(value) == float(published[name]), name
        assert source == "script"
    assert Path(shown["dataset_name"][0]).name == published["mix"]
    assert Path(shown["deepspeed"][0]).name == published["deepspeed"]
    workers = published["plus_dataloader_num_workers" if plus else "dataloader_num_workers"]
    assert shown["dataloader_num_workers"] == (workers, "script")
    assert {row["option"]: shown[row["option"]][0] for row in table("common.tsv")} == {
        row["option"]: row["value"] for row in table("common.tsv")
    }
    assert shown["audio_tokenizer_type"] == (family, "script")
    assert shown["model_max_length"] == ("8192", "argument")
    assert shown["model_name_or_path"] == (str(start), "script")
    assert shown["mtp_detach_backbone"] == (str(plus), "checkpoint")

    parts = [re.fullmatch(r"([a-z ]+?) +([\d,]+) +([\d,]+)", line) for line in found["trains and costs"]]
    trained = {part[1] for part in parts if part and part[2] != "0"}
    assert trained == {part for part in published["trains"].split(", ") if plus or "adapter" not in part}

    number = 2 if stage == "mtp10_stage2" else 1
    mix = [line.split() for line in found["data"][1:]]
    wanted = Counter(row["set"] for row in table("published_mix.tsv"))
    ratios = {row["set"]: float(row[f"stage{number}_ratio"]) for row in table("published_mix.tsv")}
    assert {name: int(files) for name, files, *_ in mix if name != "all"} == wanted
    assert {name: float(ratio) for name, _, _, ratio, *_ in mix if name != "all"} == ratios
    assert mix[-1][:2] == ["all", "116"]

    assert status == 78, "no file of the mix is here"
    assert found["would be refused"] == ["the mix has no samples; check its paths, ratios and nums"]
    assert not Path(shown["output_dir"][0]).exists()


def test_the_plan_of_a_dry_run_shows_how_many_layers_recompute(stand_ins, capsys, monkeypatch):
    (stand_ins.root / "models/Qwen/Qwen2.5-7B-Instruct/config.json").write_text(json.dumps(SMALL))
    settings = {"DRY_RUN": "1", "CHECKPOINTED_LAYERS": "auto", "TORCH_COMPILE": "True"}
    for memory, shown in (("80", "0 of 2 layers"), ("1", "2 of 2 layers")):
        flags = ("--gpu_memory_gb", memory)
        call = stand_ins.call("finetune_glm4voice_stage1", "512", "run", *flags, **settings)
        text = printed(call, capsys, monkeypatch)[1]
        assert f"{shown} recompute their activations" in sections(text)["trains and costs"]
        assert values(text)["checkpointed_layers"] == ("auto", "environment: CHECKPOINTED_LAYERS")
        assert values(text)["torch_compile"] == ("True", "environment: TORCH_COMPILE")


def test_every_value_says_where_it_comes_from(stand_ins, capsys, monkeypatch):
    (stand_ins.root / "models/Qwen/Qwen2.5-7B-Instruct/config.json").write_text(json.dumps(SMALL))
    call = stand_ins.call(
        *(
            "finetune_glm4voice_stage1",
            "512",
            "run",
            "--seed",
            "7",
            "--mtp_model_lr_mult=1",
            "--adam-beta1",
            "0.8",
        ),
        DRY_RUN="1",
        LEARNING_RATE="1e-4",
        NUM_HEADS="2",
        DEEPSPEED_CONFIG=str(REPOSITORY / "configs/quickstart/ds_config_zero2_no_optimizer.json"),
    )
    shown = values(printed(call, capsys, monkeypatch)[1])
    assert shown["seed"] == ("7", "flag")
    assert shown["adam_beta1"] == ("0.8", "flag")
    assert shown["mtp_learning_rate_multiplier"] == ("1", "flag")
    assert "mtp_model_lr_mult" not in shown
    assert shown["learning_rate"] == ("1e-4", "environment: LEARNING_RATE")
    assert shown["num_nextn_predict_layers"] == ("2", "environment: NUM_HEADS")
    assert shown["deepspeed"][1] == "environment: DEEPSPEED_CONFIG"
    assert shown["max_steps"] == ("8000", "script")
    assert shown["hidden_size"] == ("32", "checkpoint")
    assert shown["layers"] == ("2 and 2 heads", "checkpoint")
    assert shown["strict_data"] == ("False", "default")
    assert shown["dtype"] == ("auto: bfloat16", "default")


@pytest.mark.slow
def test_a_dry_run_of_a_small_world_would_start_and_counts_its_samples(tiny_world):
    run = tiny_world.run_stage("stage1", MODEL_NAME_OR_PATH=str(tiny_world.root / "base"), DRY_RUN="1")
    assert run.returncode == 0, run.stdout + run.stderr
    found = sections(run.stdout)
    assert found["data"][1].split() == ["text", "1", "0", "1", "200", "200"]
    assert run.stdout.rstrip().endswith("would start")
    assert not (tiny_world.root / "out").exists()
    command = found["command"][0]
    trained = subprocess.run(["bash", "-c", command], env=tiny_world.environment(
        PYTHONPATH=str(REPOSITORY)), capture_output=True, text=True, check=False, timeout=300)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    again = tiny_world.run_stage(
        "stage1",
        MODEL_NAME_OR_PATH=str(tiny_world.root / "base"),
        DRY_RUN="1",
        MAX_STEPS="6",
        LEARNING_RATE="2e-3",
    )
    assert again.returncode == 0, again.stdout + again.stderr
    continued = sections(again.stdout)["continues"]
    assert continued[0] == f"from {tiny_world.result('stage1')}/checkpoint-4"
    assert "--learning_rate 0.002 (was 0.001) applies from here on" in continued


def test_what_would_refuse_the_start_is_named_and_the_rest_is_printed_all_the_same(tiny_world):
    run = tiny_world.run_stage("mtp10_stage1", "--weight_decay", "0.1", DRY_RUN="1")
    assert run.returncode == 78
    lines = sections(run.stdout)["would be refused"]
    assert any("run the previous stage first" in line for line in lines)
    assert any("--weight_decay 0.1" in line for line in lines)
    assert values(run.stdout)["weight_decay"] == ("0.1", "flag")
