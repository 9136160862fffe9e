"""Runs that are told to stop, queued again by SLURM's script, saved by the clock, or stuck."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vita_audio.training.checkpoints import checkpoints, is_complete
from vita_audio.training.interruption import REQUEUE

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools/finetune_sts.py"
SBATCH = REPOSITORY / "scripts/slurm/train.sbatch"

pytestmark = pytest.mark.slow

STUCK = """
import os, time
from vita_audio.cli import finetune

open_model = finetune.open_model

def never_return(gradient):
    time.sleep(3600)

def open_and_get_stuck(*args):
    model = open_model(*args)
    if os.environ["RANK"] == "1":
        next(model.parameters()).register_hook(never_return)
    return model

finetune.open_model = open_and_get_stuck
finetune.main()
"""


def losses(world, folder: Path) -> list[float]:
    return [line["loss"] for line in world.logged(folder)]


def start(world, folder: Path, processes: int, **options: object) -> subprocess.Popen:
    launcher = [sys.executable, REPOSITORY / "vita_audio/cli/launch.py", "--standalone"]
    command = [*launcher, "--nproc_per_node", processes, TOOL, *world.options(folder, **options)]
    environment = {**world.environment(), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [str(part) for part in command], cwd=world.root, env=environment, stderr=subprocess.PIPE, text=True
    )


def test_slurms_script_saves_on_its_signal_queues_again_and_ends_where_an_undisturbed_run_ends(
    tiny_world, processes
):
    tools = tiny_world.root / "cluster"
    tools.mkdir()
    for name, body in (
        ("srun", 'shift; SLURM_NODEID=0 exec "$@"'),
        ("scontrol", f'echo "$@" >>{tools}/asked; [ "$1" != show ] || echo 127.0.0.1'),
    ):
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    settings = {
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node0",
        "REPOSITORY": str(REPOSITORY),
        "MODEL_NAME_OR_PATH": str(tiny_world.root / "base"),
        "MAX_STEPS": "60",
        "SAVE_STEPS": "5",
    }
    command = ["bash", str(SBATCH), "finetune_glm4voice_stage1", "128"]
    environment = tiny_world.environment(**settings)
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    job = subprocess.Popen([*command, "requeued"], cwd=tiny_world.root, env=environment)
    folder = tiny_world.root / "out/finetune_glm4voice_stage1/requeued"
    processes.wait_for(lambda: job.poll() is not None or any(map(is_complete, checkpoints(folder))), 240)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == REQUEUE
    assert (tools / "asked").read_text().splitlines()[-1] == "requeue 17"
    stopped = checkpoints(folder)[-1]
    assert is_complete(stopped)
    assert int(stopped.name.split("-")[1]) < 60
    assert not (folder / "stage.complete").exists()
    assert subprocess.run([*command, "requeued"], env=environment, check=False, timeout=300).returncode == 0
    assert (
        subprocess.run([*command, "undisturbed"], env=environment, check=False, timeout=300).returncode == 0
    )
    assert losses(tiny_world, folder) == losses(tiny_world, folder.parent / "undisturbed")
    assert (tools / "asked").read_text().count("requeue") == 1


def test_a_terminated_launcher_waits_for_the_checkpoint(tiny_world, processes):
    folder = tiny_world.root / "terminated"
    run = start(tiny_world, folder, 2, max_steps=500, save_steps=3)
    processes.wait_for(lambda: run.poll() is not None or any(map(is_complete, checkpoints(folder))), 240)
    run.send_signal(signal.SIGTERM)
    _, error = run.communicate(timeout=120)
    assert run.returncode == REQUEUE, error
    assert "launch: stopped by SIGTERM with status 75" in error
    assert "which is saved; start again to go on" in error
    assert is_complete(checkpoints(folder)[-1])
    assert not (folder / "model.safetensors").exists()


def test_checkpoints_are_also_saved_by_the_clock(tiny_world):
    folder = tiny_world.root / "clock"
    run = tiny_world.launch(
        1, TOOL, *tiny_world.options(folder, max_steps=3, save_steps=1000, save_at=1e-6, save_total_limit=9)
    )
    assert run.returncode == 0, run.stderr
    assert [each.name for each in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_hang_ends_with_the_stacks_of_all_processes(tiny_world):
    (tiny_world.root / "stuck.py").write_text(STUCK)
    options = tiny_world.options(tiny_world.root / "stuck", hang_minutes=0.1, ddp_backend="gloo")
    run = tiny_world.launch(2, tiny_world.root / "stuck.py", *options)
    assert run.returncode not in (0, REQUEUE)
    assert "Timeout (0:00:06)!" in run.stderr
    assert "in never_return" in run.stderr
    assert run.stderr.count("most recent call first") >= 2
