"""What the stage scripts make of their arguments, their environment and the machine, before anything is trained."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = REPOSITORY / "scripts/deepspeed/sts_qwen25"
STAGE = "finetune_glm4voice_stage1"


def test_a_script_without_arguments_takes_the_published_length_and_the_hour(stand_ins):
    call = stand_ins.call(STAGE)
    assert call.status == 0, call.printed
    assert call.value("--model_max_length") == "32768"
    output_dir = Path(call.value("--output_dir"))
    assert output_dir.parent == stand_ins.root / "output/LM" / STAGE
    assert re.fullmatch(r"\d{8}_\d{2}0000", output_dir.name)


@pytest.mark.parametrize(
    ("words", "length", "timestamp"),
    [
        (("8192",), "8192", None),
        (("8192", "run"), "8192", "run"),
        (("8192", "run", "--seed", "1"), "8192", "run"),
        (("--seed", "1"), "32768", None),
        (("8192", "--seed", "1"), "8192", None),
        (("", "run"), "32768", "run"),
    ],
)
def test_both_arguments_are_optional_and_flags_may_follow(stand_ins, words, length, timestamp):
    call = stand_ins.call(STAGE, *words)
    assert call.value("--model_max_length") == length
    assert timestamp in (None, Path(call.value("--output_dir")).name)
    assert call.value("--seed") == ("1" if "--seed" in words else "42")


def test_a_stage_starts_from_the_one_before_under_the_same_timestamp(stand_ins):
    before = stand_ins.call("finetune_glm4voice_mtp1_stage1", "8192", "run")
    after = stand_ins.call("finetune_glm4voice_mtp10_stage1", "8192", "run")
    assert after.value("--model_name_or_path") == before.value("--output_dir")


@pytest.mark.parametrize(
    "typed", ["scripts/deepspeed/sts_qwen25/{}.sh", "./scripts/deepspeed/sts_qwen25/{}.sh"]
)
def test_results_are_in_one_place_however_the_script_is_called(stand_ins, typed):
    call = stand_ins.call(typed.format(STAGE), "8192", "run", typed_in=REPOSITORY)
    assert call.value("--output_dir") == str(stand_ins.root / "output/LM" / STAGE / "run")


def test_the_scratch_folder_holds_caches_and_never_results(stand_ins, tmp_path):
    scratch = tmp_path / "scratch"
    call = stand_ins.call(STAGE, "8192", "run", LOCAL_ROOT_PATH=str(scratch))
    assert call.value("--output_dir").startswith(f"{stand_ins.root}/output/LM/")
    assert not any(word.startswith(str(scratch)) for word in call.words)
    for cache in ("HF_DATASETS_CACHE", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"):
        assert call.environment[cache].startswith(f"{scratch}/cache/")
    own = stand_ins.call(STAGE, "8192", "run", LOCAL_ROOT_PATH=str(scratch), HF_DATASETS_CACHE="/own")
    assert own.environment["HF_DATASETS_CACHE"] == "/own"
    assert "HF_DATASETS_CACHE" not in stand_ins.call(STAGE, "8192", "run").environment


def test_the_output_folder_keeps_script_mix_and_everything_printed(stand_ins):
    call = stand_ins.call(STAGE, "8192", "run")
    folder = Path(call.value("--output_dir"))
    assert (folder / f"{STAGE}.sh").read_text() == (STAGES / f"{STAGE}.sh").read_text()
    mix = REPOSITORY / "configs/sts_finetune_stage1.yaml"
    assert (folder / mix.name).read_text() == mix.read_text()
    assert STAGE in call.printed
    assert (folder / "log_node0.txt").read_text() == call.printed
    stand_ins.call(STAGE, "8192", "run")
    assert (folder / "log_node0.txt").read_text() == 2 * call.printed, "a continued run adds to the log"


def test_every_node_writes_its_own_log(stand_ins):
    cluster = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"}
    folder = Path(stand_ins.call(STAGE, "8192", "run", **cluster).value("--output_dir"))
    assert sorted(path.name for path in folder.iterdir()) == ["log_node1.txt"]


def test_what_is_printed_to_both_streams_and_the_exit_status_pass_through(stand_ins, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho to stdout\necho to stderr >&2\nexit 3\n")
    program.chmod(0o755)
    call = stand_ins.call(STAGE, "8192", "run", PYTHON=str(program))
    assert call.status == 3
    log = (stand_ins.root / "output/LM" / STAGE / "run/log_node0.txt").read_text()
    for line in ("to stdout\n", "to stderr\n"):
        assert line in call.printed
        assert line in log


def test_an_output_folder_that_cannot_be_created_is_reported_in_one_line(stand_ins, tmp_path):
    (tmp_path / "file").touch()
    call = stand_ins.call(STAGE, "8192", "run", OUTPUT_ROOT=str(tmp_path / "file"))
    assert call.status == 1
    assert call.printed.splitlines()[-1].startswith(f"error: OUTPUT_DIR={tmp_path}/file/")
    assert len(call.printed.splitlines()) == 1


def test_without_a_gpu_supported_options_are_chosen_and_reported_in_one_line(stand_ins):
    call = stand_ins.call(STAGE, "8192", "run", gpus=0)
    got = {
        flag: call.value(f"--{flag}")
        for flag in ("bf16", "dataloader_num_workers", "gradient_accumulation_steps")
    }
    assert got == {"bf16": "False", "dataloader_num_workers": "1", "gradient_accumulation_steps": "1"}
    assert call.value("--use_cpu") == "True"
    assert call.value("--ddp_backend") == "gloo"
    (line,) = [line for line in call.printed.splitlines() if "no GPU here" in line]
    for chosen in (
        "NPROC_PER_NODE=2",
        "BF16=False",
        "DATALOADER_NUM_WORKERS=1",
        "GRADIENT_ACCUMULATION_STEPS=1",
    ):
        assert chosen in line


def test_without_a_gpu_given_options_are_kept(stand_ins):
    own = {
        "BF16": "True",
        "DATALOADER_NUM_WORKERS": "5",
        "GRADIENT_ACCUMULATION_STEPS": "7",
        "NPROC_PER_NODE": "1",
    }
    call = stand_ins.call(STAGE, "8192", "run", gpus=0, **own)
    assert call.value("--bf16") == "True"
    assert call.value("--dataloader_num_workers") == "5"
    assert call.value("--gradient_accumulation_steps") == "7"
    assert call.value("--nproc_per_node") == "1"


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("warmup_cosine", '{"cos_min_ratio": 0.1}'),
        ("cosine_with_min_lr", '{"min_lr_rate": 0.1}'),
        ("cosine", '{"num_cycles": 0.5}'),
    ],
)
def test_the_schedule_can_be_chosen(stand_ins, kind, arguments):
    call = stand_ins.call(STAGE, "8192", "run", LR_SCHEDULER_TYPE=kind)
    assert call.value("--lr_scheduler_type") == kind
    assert call.value("--lr_scheduler_kwargs") == arguments
    linear = stand_ins.call(STAGE, "8192", "run", LR_SCHEDULER_TYPE="linear")
    assert "--lr_scheduler_kwargs" not in linear.words


SWITCHES = {
    "NUM_NEXTN_PREDICT_LAYERS": "3",
    "LANGUAGE_MODEL_FREEZE": "True",
    "AUDIO_MODEL_FREEZE": "False",
    "ATTN_IMPLEMENTATION": "eager",
    "AUDIO_TOKENIZER_TYPE": "mel_vq",
    "AUDIO_TOKENIZER_PATH": "/codec",
    "AUDIO_TOKEN_CACHE": "/tokens",
    "AUDIO_FEATURE_CACHE": "/features",
    "AUDIO_MODEL_NAME_OR_PATH": "/sensevoice",
    "MODEL_NAME_OR_PATH": "/model",
    "DATA_ROOT": "/data",
    "MAX_ERROR_SHARE": "0.5",
    "MAX_STEPS": "7",
    "LEARNING_RATE": "1e-6",
    "MTP_LEARNING_RATE_MULTIPLIER": "3",
    "WEIGHT_DECAY": "0.2",
    "DECAY_NORMS": "True",
    "LOSS_AVERAGE": "rank",
    "PER_DEVICE_TRAIN_BATCH_SIZE": "2",
    "GRADIENT_ACCUMULATION_STEPS": "5",
    "ADAM_BETA1": "0.8",
    "ADAM_BETA2": "0.9",
    "ADAM_EPSILON": "1e-7",
    "MAX_GRAD_NORM": "2.0",
    "WARMUP_RATIO": "0.1",
    "BF16": "False",
    "TF32": "False",
    "GRADIENT_CHECKPOINTING": "False",
    "SEED": "1",
    "DATA_SEED": "2",
    "DATALOADER_NUM_WORKERS": "3",
    "SAVE_STEPS": "11",
    "SAVE_TOTAL_LIMIT": "4",
    "LOGGING_STEPS": "6",
    "REPORT_TO": "none",
    "DDP_TIMEOUT": "60",
}


@pytest.mark.parametrize(
    "stage", ["finetune_glm4voice_mtp1_stage1", "finetune_sensevoice_glm4voice_mtp10_stage2"]
)
def test_every_switch_of_a_stage_reaches_its_flag(stand_ins, stage):
    call = stand_ins.call(stage, "8192", "run", **SWITCHES, NUM_HEADS=SWITCHES["NUM_NEXTN_PREDICT_LAYERS"])
    assert {name: call.value(f"--{name.lower()}") for name in SWITCHES} == SWITCHES
    own = stand_ins.call(
        stage, "8192", "run", DEEPSPEED_CONFIG="/ds.json", TEXT_AUDIO_INTERVAL_RATIO="1 4 3 8"
    )
    assert own.value("--deepspeed") == "/ds.json"
    after = own.words.index("--text_audio_interval_ratio") + 1
    assert own.words[after : after + 4] == ["1", "4", "3", "8"]


# -- machines ------------------------------------------------------------------------------------------------

CLUSTER = {
    "NPROC_PER_NODE": "8",
    "WORLD_SIZE": "4",
    "RANK": "3",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "34567",
}


def test_on_a_cluster_world_size_and_rank_count_nodes(stand_ins):
    call = stand_ins.call(STAGE, "8192", "run", **CLUSTER)
    want = "--nnodes 4 --node_rank 3 --master_addr node0 --master_port 34567 --nproc_per_node 8"
    assert want in " ".join(call.launcher)
    assert (stand_ins.root / "output/LM" / STAGE / "run/log_node3.txt").is_file()


def test_without_processes_per_node_world_size_and_rank_are_not_the_clusters(stand_ins):
    call = stand_ins.call(STAGE, "8192", "run", WORLD_SIZE="4", RANK="3")
    assert "--standalone --nproc_per_node 8" in " ".join(call.launcher)


def test_explicit_node_variables_take_precedence(stand_ins):
    call = stand_ins.call(STAGE, "8192", "run", **CLUSTER, NNODES="2", NODE_RANK="1")
    assert "--nnodes 2 --node_rank 1" in " ".join(call.launcher)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({}, "1 0 8 127.0.0.1 34567"),
        (CLUSTER | {"MASTER_PORT": ""}, "4 3 8 node0 34567"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "5"}, "2 1 8 node0 5"),
    ],
)
def test_the_cluster_environment_prints_the_arguments_of_torchrun(tmp_path, settings, want):
    command = f"set -eu; source {REPOSITORY}/scripts/set_env_ds_gpu.sh; env -0"
    environment = cluster_environment(tmp_path) | settings
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    exported = dict(entry.split("=", 1) for entry in run.stdout.split("\0") if "=" in entry)
    names = ("NNODES", "NODE_RANK", "NPROC_PER_NODE", "MASTER_ADDR", "MASTER_PORT")
    assert " ".join(exported[name] for name in names) == want


def cluster_environment(folder: Path) -> dict[str, str]:
    """An environment whose virtual environment is there already, so that nothing is installed."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    for file in ("python", "activate"):
        (venv / "bin" / file).write_text("")
        (venv / "bin" / file).chmod(0o755)
    (venv / ".cluster").touch()
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "VENV": str(venv)}
