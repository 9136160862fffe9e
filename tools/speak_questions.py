"""Make spoken questions and answers from those of a text set; see vita_audio/cli/speak_questions.py.

python tools/speak_questions.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.speak_questions import main

if __name__ == "__main__":
    run_command(main)
