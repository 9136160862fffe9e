"""Prove that a mix holds no sentence and no recording of the test sets; see vita_audio/cli/check_overlap.py.

python tools/check_overlap.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.check_overlap import main

if __name__ == "__main__":
    run_command(main)
