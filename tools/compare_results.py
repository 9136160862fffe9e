"""Which differences of two evaluations are larger than chance (see vita_audio/cli/compare_results.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.compare_results import main

if __name__ == "__main__":
    run_command(main)
