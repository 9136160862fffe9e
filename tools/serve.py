"""Serve a model; see vita_audio/cli/serve.py.

python tools/serve.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.serve import main

if __name__ == "__main__":
    run_command(main)
