"""Turn a public corpus or your own recordings into JSON lines; see vita_audio/cli/prepare_data.py.

python tools/prepare_data.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.prepare_data import main

if __name__ == "__main__":
    run_command(main)
