"""Whole runs under the launcher, with DeepSpeed: stopped, killed, continued, converted, refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow
TOOL = REPOSITORY / "tools" / "finetune_sts.py"
ZERO2 = REPOSITORY / "configs" / "quickstart" / "ds_config_zero2.json"
ZERO2_OURS = REPOSITORY / "scripts" / "deepspeed" / "ds_config_zero2_no_optimizer.json"

BAD_GRADIENTS = """
import sys
from vita_audio.cli import finetune

open_model = finetune.open_model

def open_with_bad_gradients(*args):
    model = open_model(*args)
    next(model.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    return model

finetune.open_model = open_with_bad_gradients
finetune.main()
"""


def train(world, folder, processes=2, tool=TOOL, deepspeed=ZERO2, **options):
    options = world.options(folder, deepspeed=deepspeed, ddp_backend="gloo", **options)
    return world.launch(processes, tool, *options)


def succeed(*args, **options):
    run = train(*args, **options)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def said(run):
    """The lines in which the run states why it ended."""
    return [line for line in run.stderr.splitlines() if line.startswith(("finetune_sts: ", "launch: "))]


@pytest.mark.parametrize("deepspeed", [ZERO2, ZERO2_OURS], ids=["deepspeeds_optimizer", "our_optimizer"])
def test_a_lower_rate_takes_effect_when_a_deepspeed_run_is_restarted(tiny_world, tmp_path, deepspeed):
    common = {
        "deepspeed": deepspeed,
        "decay_norms": deepspeed == ZERO2,  # DeepSpeed's own optimizer decays them
        "lr_scheduler_type": "constant",
        "save_steps": 3,
    }
    succeed(tiny_world, tmp_path / "out", processes=1, max_steps=3, **common)
    changed = {"learning_rate": 1e-5, "weight_decay": 0.5, "adam_beta2": 0.9}
    run = succeed(tiny_world, tmp_path / "out", processes=1, max_steps=5, **changed, **common)
    assert [line["learning_rate"] for line in tiny_world.logged(tmp_path / "out")] == [1e-3] * 3 + [1e-5] * 2
    assert run.stderr.count("--learning_rate 1e-05 (was 0.001) applies from here on") == 1
    for group in optimizer_groups(tmp_path / "out" / "checkpoint-5"):
        assert (group["lr"], group["betas"][1]) == (1e-5, 0.9)
        assert group["weight_decay"] in (0.5, 0.0)
    assert any(group["weight_decay"] == 0.5 for group in optimizer_groups(tmp_path / "out" / "checkpoint-5"))


def optimizer_groups(checkpoint):
    (file,) = checkpoint.glob("global_step*/*zero_pp_rank_0_*optim_states.pt")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    return state["param_groups"] if isinstance(state, dict) else state[0]["param_groups"]


@pytest.mark.parametrize("deepspeed", [ZERO2, ZERO2_OURS], ids=["deepspeeds_optimizer", "our_optimizer"])
def test_a_converted_checkpoint_continues_on_another_number_of_processes_with_the_same_losses(
    tiny_world, tmp_path, deepspeed
):
    # One sample over and over: the rows are the same, however many processes share them.
    text = "one two three"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    (tiny_world.root / "same.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 64)
    mix = tiny_world.root / "same.yaml"
    mix.write_text("dataset: {text: {data_paths: [same.jsonl]}}\n")
    common = {"dataset_name": mix, "deepspeed": deepspeed, "lr_scheduler_type": "constant", "save_steps": 3}
    succeed(tiny_world, tmp_path / "two", max_steps=6, **common)
    shutil.copytree(tmp_path / "two" / "checkpoint-3", tmp_path / "out" / "checkpoint-3")

    alone = {**common, "processes": 1, "gradient_accumulation_steps": 2, "max_steps": 6}
    refused = train(tiny_world, tmp_path / "out", **alone)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    convert = f"bash scripts/deepspeed/convert_checkpoint.sh {checkpoint}"
    assert refused.returncode == 78
    why = f"{checkpoint} was written by 2 processes and this run has 1; start 2"
    assert said(refused) == [f"finetune_sts: {why}, or convert it first: {convert}"]
    environment = {**os.environ, "PYTHON": sys.executable}
    subprocess.run(convert.split(), cwd=REPOSITORY, env=environment, check=True, capture_output=True)
    succeed(tiny_world, tmp_path / "out", **alone)
    got, want = ([line["loss"] for line in tiny_world.logged(tmp_path / name)] for name in ("out", "two"))
    assert len(got) == 6
    assert got == pytest.approx(want, abs=1e-5)


def test_a_checkpoint_whose_weights_deepspeed_would_reorder_is_not_converted(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "checkpoint.complete").touch()
    (checkpoint / "latest").write_text("global_step3")
    deepspeed = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    (checkpoint / "run.json").write_text(json.dumps({"arguments": {"deepspeed": deepspeed}}))
    run = subprocess.run(
        ["bash", "scripts/deepspeed/convert_checkpoint.sh", checkpoint],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "written with round_robin_gradients" in run.stderr
    assert run.stderr.count("\n") == 1


def test_ten_skipped_steps_in_a_row_stop_the_run(tiny_world, tmp_path):
    tool = tmp_path / "bad_gradients.py"
    tool.write_text(BAD_GRADIENTS)
    run = train(tiny_world, tmp_path / "out", 1, tool, bf16=True, max_steps=30, save_steps=30)
    assert run.returncode == 78
    (line,) = said(run)
    assert line.startswith("finetune_sts: 10 steps in a row, up to step 10, were skipped")
    assert not (tmp_path / "out" / "stage.complete").exists()


def test_a_short_run_whose_every_step_was_skipped_is_not_complete(tiny_world, tmp_path):
    tool = tmp_path / "bad_gradients.py"
    tool.write_text(BAD_GRADIENTS)
    run = train(tiny_world, tmp_path / "out", 1, tool, max_steps=2, save_steps=2)
    assert run.returncode == 78
    (line,) = said(run)
    assert line.startswith("finetune_sts: every step was skipped")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_an_update_with_gradients_that_are_not_finite_is_never_saved(tiny_world, tmp_path):
    tool, config = tmp_path / "bad_gradients.py", tmp_path / "ds.json"
    tool.write_text(BAD_GRADIENTS)
    unchecked = json.loads(ZERO2.read_text()) | {"bf16": {"enabled": True, "check_grad_overflow": False}}
    config.write_text(json.dumps(unchecked))
    run = train(tiny_world, tmp_path / "out", 1, tool, deepspeed=config, bf16=True, max_steps=1, save_steps=1)
    assert run.returncode == 78
    (line,) = said(run)
    assert line.startswith("finetune_sts: the gradients of step 1 are not finite")
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_a_second_run_into_a_folder_is_refused_in_one_line(tiny_world, tmp_path, owned_by_another_process):
    with owned_by_another_process(tmp_path / "out") as owner:
        run = train(tiny_world, tmp_path / "out", processes=1)
    assert run.returncode == 78
    (line,) = said(run)
    assert f"process {owner.pid} on " in line
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("seconds", [0.3, 3, "while it trains"])
def test_no_trainer_outlives_a_launcher_that_is_killed(tiny_world, tmp_path, seconds, processes):
    options = tiny_world.options(
        tmp_path / "out",
        deepspeed=ZERO2,
        ddp_backend="gloo",
        max_steps=100_000,
        save_steps=50_000,
        dataloader_num_workers=1,
    )
    command = [
        sys.executable,
        REPOSITORY / "vita_audio/cli/launch.py",
        "--standalone",
        "--nproc_per_node",
        2,
        TOOL,
    ]
    process = subprocess.Popen(
        [str(part) for part in (*command, *options)],
        env={**tiny_world.environment(), "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        stderr=open(tmp_path / "log", "w"),  # noqa: SIM115
    )
    processes.wait_for(lambda: processes.children(process.pid))
    if isinstance(seconds, str):
        processes.wait_for(
            lambda: (
                "data/epoch" in (tmp_path / "log").read_text() or (tmp_path / "out" / "run.json").exists()
            ),
            240,
        )
        time.sleep(3)
    else:
        time.sleep(seconds)
    process.kill()
    process.wait()
    processes.wait_for(lambda: not processes.of(tmp_path))
