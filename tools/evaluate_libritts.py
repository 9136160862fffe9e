"""LibriTTS as published: sampled replies, numbers spelled out on both sides (see vita_audio/cli/evaluate.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.evaluate import main_single

if __name__ == "__main__":
    run_command(lambda: main_single("tts", text_normaliser="libritts", transcriber="whisper", language="en"))
