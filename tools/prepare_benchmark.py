"""Prepare a public test set for evaluation (see vita_audio/cli/prepare_benchmark.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.prepare_benchmark import main

if __name__ == "__main__":
    run_command(main)
