"""Seed-TTS from its meta.lst; with --speaker_prompt, in the speaker's voice (see vita_audio/cli/evaluate.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.evaluate import main_single

if __name__ == "__main__":
    run_command(lambda: main_single("seed_tts", transcriber="whisper", language="en"))
