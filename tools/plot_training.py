"""Draw the curves of training runs; see vita_audio/cli/plot_training.py.

python tools/plot_training.py RUN [RUN …]
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.plot_training import main

if __name__ == "__main__":
    run_command(main)
