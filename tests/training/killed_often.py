"""Trains two DeepSpeed processes, kills them at random moments again and again, and compares with a run that was not.

    python tests/training/killed_often.py WORLD --kills 100 --seed 1

WORLD holds base/, a tiny model, and mix.yaml. Runs are killed, or told to stop by SIGTERM, and started again until they
end; then their losses and weights must equal those of the undisturbed run, bit for bit. One line is printed for each
disturbance, and a JSON line with their sum. test_killed_often.py runs ten.

All libraries are imported once, and each training process is a fork of this one: a start takes a second, not ten.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401  imported before the forks

from vita_audio.cli import finetune
from vita_audio.training.checkpoints import checkpoints, is_complete, last_complete_checkpoint
from vita_audio.training.interruption import REQUEUE

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 12, 2
MOMENTS = ("starting", "training", "saving", "saving", "told to stop")
STOPPED = "stopped by SIGTERM"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    arguments = parser.parse_args()
    world, draw = arguments.world, random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    run = Run(world / "whole")
    run.start()
    assert run.wait() == [0, 0], run.log()
    expected, ends, runs = run.result(), Counter(), 0
    while ends.total() - ends[STOPPED] < arguments.kills:
        runs += 1
        run = Run(world / f"killed_{runs}")
        while (end := disturb(run, draw)) is not None:
            ends[end] += 1
            print(f"run {runs}: {end}; the last complete checkpoint is {run.last()}", flush=True)
        assert run.result() == expected, f"run {runs} differs from the undisturbed run: {run.folder}"
        print(f"run {runs}: the losses and weights of the undisturbed run", flush=True)
        shutil.rmtree(run.folder)
    kills = ends.total() - ends[STOPPED]
    print(json.dumps({"runs": runs, "kills": kills, "stops": ends[STOPPED], **ends}), flush=True)


class Run:
    """Two processes that train into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.pids: list[int] = []
        self.statuses: dict[int, int] = {}
        self.started = 0.0

    def start(self) -> None:
        """Fork the two processes."""
        self.folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.started, self.statuses = time.time(), {}
        self.pids = [self._fork(rank, port) for rank in range(2)]

    def _fork(self, rank: int, port: int) -> int:
        if pid := os.fork():
            return pid
        try:
            os.setpgrp()
            log = os.open(self.folder / "log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
            }
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            finetune.main(self._options())
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)

    def _options(self) -> list[str]:
        world = self.folder.parent
        options = {
            "model_name_or_path": world / "base",
            "audio_tokenizer_type": "glm4voice",
            "dataset_name": world / "mix.yaml",
            "model_max_length": 128,
            "output_dir": self.out,
            "deepspeed": REPOSITORY / "configs/quickstart/ds_config_zero2.json",
            "max_steps": STEPS,
            "save_steps": SAVE_EVERY,
            "save_strategy": "steps",
            "save_total_limit": 2,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "ddp_backend": "gloo",
            "disable_tqdm": True,
        }
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def ended(self) -> bool:
        """Whether a process has ended."""
        for pid in self.pids:
            if pid not in self.statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return bool(self.statuses)

    def wait(self) -> list[int]:
        """Exit statuses of both, when both have ended."""
        while not self.ended() or len(self.statuses) < len(self.pids):
            time.sleep(0.01)
        return [self.statuses[pid] for pid in self.pids]

    def kill(self, pids: list[int], number: int) -> None:
        """Send a signal to those that have not ended."""
        self.ended()
        for pid in pids:
            if pid not in self.statuses:
                os.kill(pid, number)

    def writing(self) -> list[Path]:
        """Checkpoints that this start has begun to write and not completed."""
        return [
            each
            for each in checkpoints(self.out)
            if not is_complete(each) and each.stat().st_mtime >= self.started
        ]

    def steps(self) -> int:
        """Steps that the log of all starts counts."""
        return self.log().count("'loss'")

    def last(self) -> str:
        checkpoint = last_complete_checkpoint(self.out)
        return "none" if checkpoint is None else checkpoint.name

    def log(self) -> str:
        file = self.folder / "log.txt"
        return file.read_text(errors="replace") if file.exists() else ""

    def result(self) -> tuple[list[float], str]:
        """The losses of all steps, and a digest of the weights."""
        assert (self.out / "stage.complete").exists(), self.log()[-3000:]
        history = json.loads((self.out / "trainer_state.json").read_text())["log_history"]
        losses = [line["loss"] for line in history if "loss" in line]
        assert len(losses) == STEPS
        return losses, hashlib.sha256((self.out / "model.safetensors").read_bytes()).hexdigest()


def disturb(run: Run, draw: random.Random) -> str | None:
    """Start a run and end it at a random moment: how it ended, or None if it was over before."""
    before = run.steps()
    run.start()
    moment = draw.choice(MOMENTS)

    def reached(condition: Callable[[], object]) -> None:
        while not run.ended() and not condition():
            time.sleep(0.0005)

    if moment == "starting":
        time.sleep(draw.uniform(0, 2))
    elif moment == "saving":
        reached(run.writing)
        if draw.random() < 0.5:  # the next one
            reached(lambda: not run.writing())
            reached(run.writing)
        time.sleep(draw.uniform(0, 0.1))
    else:
        steps = before + draw.randint(1, STEPS // 2)
        reached(lambda: run.steps() >= steps)
        time.sleep(draw.uniform(0, 0.02))
    torn = bool(run.writing())
    if moment == "told to stop":
        run.kill(run.pids, signal.SIGTERM)
        statuses = run.wait()
        assert statuses in ([0, 0], [REQUEUE, REQUEUE]), (statuses, run.log()[-3000:])
        return STOPPED if REQUEUE in statuses else None
    victim = draw.choice([0, 1, None])
    run.kill(run.pids if victim is None else [run.pids[victim]], signal.SIGKILL)
    time.sleep(draw.uniform(0, 0.3))  # the other may go on for a moment, until a launcher would end it
    run.kill(run.pids, signal.SIGKILL)
    if run.wait() == [0, 0]:
        return None
    who = "both processes" if victim is None else f"process {victim}"
    when = "writing a checkpoint" if torn else "starting" if moment == "starting" else "training"
    return f"{who} killed while {when}"


if __name__ == "__main__":
    main()
