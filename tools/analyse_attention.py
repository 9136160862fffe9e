"""Attention of speech on text, speech with text hidden, what heads know; see vita_audio/cli/analyse_attention.py."""

from vita_audio.cli.analyse_attention import main
from vita_audio.cli.arguments import run_command

if __name__ == "__main__":
    run_command(main)
