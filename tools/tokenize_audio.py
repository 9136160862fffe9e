"""Precompute the speech codes of a data mix; see vita_audio/cli/tokenize_audio.py.

python tools/tokenize_audio.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.tokenize_audio import main

if __name__ == "__main__":
    run_command(main)
