"""Check a cluster before a stage runs on it; see vita_audio/cli/preflight.py.

bash scripts/preflight.sh finetune_glm4voice_stage1
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.preflight import main

if __name__ == "__main__":
    run_command(main)
