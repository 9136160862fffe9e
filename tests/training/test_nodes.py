"""Two "nodes" on one machine, through a stage script: they train as one node does, one dies, both go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vita_audio.training.checkpoints import checkpoints, is_complete

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts/deepspeed/sts_qwen25/finetune_glm4voice_stage1.sh"
SETTINGS = {"MAX_STEPS": "30", "SAVE_STEPS": "3", "DATALOADER_NUM_WORKERS": "1"}

pytestmark = pytest.mark.slow


def start_node(world, rank: int, output: Path) -> subprocess.Popen:
    """One node: its own copies of model, data and repository caches; only the output folder is shared."""
    own = world.root / f"node{rank}"
    if not own.exists():
        own.mkdir()
        for name in ("base", "mix.yaml", "text.jsonl"):
            source = world.root / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, own / name)
    settings = {
        **SETTINGS,
        "NNODES": "2",
        "NODE_RANK": str(rank),
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "HOME": str(own),
        "HF_HOME": str(own / "huggingface"),
        "HF_DATASETS_CACHE": str(own / "datasets"),
        "XDG_CACHE_HOME": str(own / "cache"),
        "TMPDIR": str(own),
        "DATASET_NAME": str(own / "mix.yaml"),
        "DATA_ROOT": str(own),
        "MODEL_NAME_OR_PATH": str(own / "base"),
        "OUTPUT_DIR": str(output),
    }
    with open(own / "printed.txt", "a") as printed:
        return subprocess.Popen(
            ["bash", SCRIPT, "128", "run"],
            cwd=own,
            env=world.environment(**settings),
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


def test_two_nodes_train_as_one_and_both_continue_after_one_has_died(tiny_world, processes):
    output = tiny_world.root / "out/nodes"
    nodes = [start_node(tiny_world, rank, output) for rank in range(2)]
    processes.wait_for(
        lambda: any(node.poll() is not None for node in nodes) or any(map(is_complete, checkpoints(output))),
        400,
    )
    printed = [tiny_world.root / f"node{rank}/printed.txt" for rank in range(2)]
    assert all(node.poll() is None for node in nodes), [file.read_text()[-2000:] for file in printed]
    os.killpg(nodes[1].pid, signal.SIGKILL)
    assert nodes[0].wait(timeout=240) != 0  # it does not wait for ever for the dead one
    assert not (output / "stage.complete").exists()
    before = [file.stat().st_size for file in printed]

    nodes = [start_node(tiny_world, rank, output) for rank in range(2)]
    statuses = [node.wait(timeout=400) for node in nodes]
    assert statuses == [0, 0], [file.read_text()[-2000:] for file in printed]
    assert "continuing from" in printed[0].read_text()[before[0] :]
    assert {file.name for file in output.glob("log_node*.txt")} == {"log_node0.txt", "log_node1.txt"}
    assert (tiny_world.root / "node1/datasets").is_dir()

    base = str(tiny_world.root / "base")
    one = tiny_world.run_stage("stage1", **SETTINGS, NPROC_PER_NODE="2", MODEL_NAME_OR_PATH=base)
    assert one.returncode == 0, one.stderr[-2000:]
    assert tiny_world.logged(output) == tiny_world.losses("stage1")
    got, want = (load_file(each / "model.safetensors") for each in (output, tiny_world.result("stage1")))
    assert all(torch.equal(got[name], want[name]) for name in want)
