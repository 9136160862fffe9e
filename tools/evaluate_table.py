"""The score table of several checkpoints, modes and test sets (see vita_audio/cli/evaluate.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.evaluate import main

if __name__ == "__main__":
    run_command(main)
