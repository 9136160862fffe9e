"""Merge LoRA adapters into their base; see vita_audio/cli/merge_lora.py.

python tools/merge_lora.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.merge_lora import main

if __name__ == "__main__":
    run_command(main)
