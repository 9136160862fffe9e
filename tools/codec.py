"""Run a speech codec; see vita_audio/cli/codec.py.

python tools/codec.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.codec import main

if __name__ == "__main__":
    run_command(main)
