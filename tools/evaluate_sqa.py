"""Speech QA: the answer in one checkpoint's text (S→T) and speech (S→S) (see vita_audio/cli/evaluate.py)."""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.evaluate import main_single

if __name__ == "__main__":
    run_command(lambda: main_single("sqa"))
