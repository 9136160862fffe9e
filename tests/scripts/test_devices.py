"""How many GPUs the scripts start processes for."""

import os
import subprocess
from pathlib import Path

import pytest

DEVICES = Path(__file__).resolve().parents[2] / "scripts/deepspeed/devices.sh"


@pytest.mark.parametrize(
    ("installed", "visible", "count"),
    [
        (8, None, 8),
        (8, "0", 1),
        (8, "2,3,5", 3),
        (8, "", 0),
        (8, "0,1,-1,2", 2),
        (8, "GPU-5d1c,GPU-77aa", 2),
        (0, "0,1", 0),
        (None, None, 0),
    ],
)
def test_only_visible_gpus_count(tmp_path, installed, visible, count):
    if installed is not None:
        lines = "".join(f"echo 'GPU {i}: NVIDIA H100 (UUID: GPU-{i})'\n" for i in range(installed))
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{lines}[ {installed} -gt 0 ] || echo 'No devices were found'\n")
        tool.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = f"set -euo pipefail; source {DEVICES}; count_gpus"
    run = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == f"{count}\n"


@pytest.mark.parametrize(
    ("machines", "flags"),
    [
        ({}, "--standalone"),
        ({"NNODES": "1"}, "--standalone"),
        ({"MASTER_PORT": "5"}, "--nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port 5"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"},
            "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 34567",
        ),
    ],
)
def test_how_the_processes_find_each_other(machines, flags):
    assert rendezvous(machines).stdout == f"{flags}\n"


def test_several_nodes_without_an_address_are_refused():
    run = rendezvous({"NNODES": "2"})
    assert run.returncode == 1
    assert (
        run.stderr == "error: NNODES=2 without MASTER_ADDR; set it on every node to the address of node 0\n"
    )


@pytest.mark.parametrize("nodes", ["0", "two", "-1"])
def test_an_invalid_number_of_nodes_is_refused_in_one_line(nodes):
    run = rendezvous({"NNODES": nodes, "MASTER_ADDR": "node0"})
    assert run.returncode == 1
    assert run.stderr == f"error: NNODES={nodes}: give the number of nodes, 1 or more\n"


def rendezvous(machines: dict[str, str]) -> subprocess.CompletedProcess:
    names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = f'set -euo pipefail; source {DEVICES}; set_rendezvous 34567; echo "${{RENDEZVOUS[*]}}"'
    return subprocess.run(
        ["bash", "-c", command], env=environment | machines, capture_output=True, text=True, check=False
    )
