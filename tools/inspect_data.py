"""Show a data mix as the model will see it; see vita_audio/cli/inspect_data.py.

python tools/inspect_data.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.inspect_data import main

if __name__ == "__main__":
    run_command(main)
