"""The quickstart in small, for tests."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CHAIN_SECONDS = 1200
"""A chain that takes longer hangs."""


def start_chain(out: Path, *flags: str) -> subprocess.Popen:
    """Start the chain; it writes to ``out``, and what it says to ``output.txt`` beside it."""
    command = ["bash", str(REPOSITORY / "scripts/quickstart.sh"), "--smoke", "--out", str(out), *flags]
    with (out.parent / "output.txt").open("a") as output:
        return subprocess.Popen(
            command, env={**os.environ, "VENV": sys.prefix}, stdout=output, stderr=subprocess.STDOUT
        )
