"""Report a run on one page; see vita_audio/cli/report.py.

python tools/report.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.report import main

if __name__ == "__main__":
    run_command(main)
