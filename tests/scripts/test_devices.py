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
