"""Plan a stage before it runs; see vita_audio/cli/plan_run.py.

python tools/plan_run.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.plan_run import main

if __name__ == "__main__":
    run_command(main)
