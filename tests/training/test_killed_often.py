"""Runs that are killed over and over, while they start, train and write checkpoints, lose nothing.

    KILLS=100 pytest -s --timeout 7200 tests/training/test_killed_often.py

makes a hundred kills instead of ten; docs/log.md has their sum.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("KILLS", "10"))


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_losses_and_weights_of_an_undisturbed_run(tiny_world):
    command = [
        sys.executable,
        REPOSITORY / "tests/training/killed_often.py",
        tiny_world.root,
        "--kills",
        KILLS,
    ]
    run = subprocess.Popen(
        [*map(str, command)],
        env={**tiny_world.environment(), "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    for line in run.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    assert run.wait() == 0, lines[-5:]
    assert json.loads(lines[-1])["kills"] >= KILLS
