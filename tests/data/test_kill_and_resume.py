"""A real training run, killed and resumed, is the run that was never killed: same rows, same losses."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 14, 4

# The training command itself, with a note of every row that the trainer receives.
RUNNER = """
import hashlib, os, runpy, sys
from pathlib import Path
from vita_audio.data.loader import TrainLoader

def noting(batches, log):
    for batch in batches:
        names = ("input_ids", "labels", "position_ids")
        row = hashlib.sha1(b"".join(batch[name].numpy().tobytes() for name in names)).hexdigest()
        with open(log, "a") as file:
            print(row, file=file)
        yield batch

if __name__ == "__main__":
    folder, tool = Path(sys.argv[1]), sys.argv[2]
    rank = os.environ["RANK"]
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    iterate = TrainLoader.__iter__
    TrainLoader.__iter__ = lambda self: noting(iterate(self), folder / f"{rank}.rows")
    sys.argv = [tool, *sys.argv[3:]]
    runpy.run_path(tool, run_name="__main__")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, goldens, write_lines, text_sample):
    """A tiny model, and a mix of text and of speech with its codes next to it."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = goldens.tokenizer("glm4voice")
    tokenizer.save_pretrained(root / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=688, **sizes, **heads)).save_pretrained(root / "model")
    rng = random.Random(0)
    texts = [
        text_sample(f"question {index} " + "hey " * rng.randint(0, 9), "well " * rng.randint(1, 9))
        for index in range(60)
    ]
    write_lines(root / "text.jsonl", [*texts, "{broken"])
    spoken = []
    for index in range(60):
        (root / f"{index}_glm4voice.json").write_text(
            json.dumps([rng.randrange(64) for _ in range(rng.randint(5, 30))])
        )
        request = {"role": "user", "content": f"Convert the text to speech.\nnumber {index}"}
        messages = [request, {"role": "assistant", "content": "<|audio|>"}]
        spoken.append({"messages": messages, "audios": [f"{index}.wav"]})
    write_lines(root / "tts.jsonl", spoken)
    write_lines(
        root / "mix.yaml",
        ["dataset: {text: {data_paths: [text.jsonl]}, tts: {ratio: 1.5, data_paths: [tts.jsonl]}}"],
    )
    (root / "runner.py").write_text(RUNNER)
    return root


def start(world: Path, name: str) -> subprocess.Popen:
    """Two DeepSpeed processes that train into ``world / name``; each with its own loader worker."""
    folder = world / name
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model_name_or_path": world / "model",
        "audio_tokenizer_type": "glm4voice",
        "dataset_name": world / "mix.yaml",
        "model_max_length": 128,
        "output_dir": folder / "out",
        "deepspeed": REPOSITORY / "configs" / "quickstart" / "ds_config_zero2.json",
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "dataloader_num_workers": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 42,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command += [world / "runner.py", folder, REPOSITORY / "tools" / "finetune_sts.py"]
    for option, value in options.items():
        command += [f"--{option}", value]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "HF_DATASETS_CACHE": str(world / "arrow"),
    }
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([*map(str, command)], env=environment, stdout=log, stderr=log)


def finish(process: subprocess.Popen, world: Path, name: str) -> None:
    assert process.wait(timeout=500) == 0, (world / name / "log.txt").read_text()[-3000:]


def rows(world: Path, name: str, rank: int) -> list[str]:
    file = world / name / f"{rank}.rows"
    return file.read_text().splitlines() if file.exists() else []


def losses(world: Path, name: str) -> dict[int, float]:
    state = json.loads((world / name / "out" / "trainer_state.json").read_text())
    return {line["step"]: line["loss"] for line in state["log_history"] if "loss" in line}


@pytest.mark.slow
def test_a_killed_run_continues_with_the_rows_and_losses_of_an_uninterrupted_one(world):
    finish(start(world, "whole"), world, "whole")
    whole_rows = [rows(world, "whole", rank) for rank in range(2)]
    assert [len(received) for received in whole_rows] == [STEPS, STEPS]
    assert len({row for received in whole_rows for row in received}) == 2 * STEPS

    kill_at = random.randint(SAVE_EVERY + 2, STEPS - 2)
    process = start(world, "killed")
    while len(rows(world, "killed", 0)) < kill_at and process.poll() is None:
        time.sleep(0.005)
    for rank in range(2):
        os.kill(int((world / "killed" / f"{rank}.pid").read_text()), signal.SIGKILL)
    assert process.wait(timeout=120) != 0, "the run was over before it could be killed"
    before = [rows(world, "killed", rank) for rank in range(2)]
    finish(start(world, "killed"), world, "killed")

    log = (world / "killed" / "log.txt").read_text()
    resumed_from = int(re.search(r"continuing from \S*checkpoint-(\d+)", log)[1])
    assert resumed_from in range(SAVE_EVERY, kill_at + 1, SAVE_EVERY)
    for rank in range(2):
        after = rows(world, "killed", rank)[len(before[rank]) :]
        assert before[rank] == whole_rows[rank][: len(before[rank])]
        assert after == whole_rows[rank][resumed_from:], f"killed at row {kill_at}, rank {rank}"
    assert list(losses(world, "whole")) == list(range(1, STEPS + 1))
    assert losses(world, "killed") == losses(world, "whole"), f"killed at row {kill_at}"
    weights = [(world / name / "out" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert hashlib.sha1(weights[0]).digest() == hashlib.sha1(weights[1]).digest()
