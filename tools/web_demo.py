"""A page to talk to; the original's name for tools/serve.py. ``--gradio``: Gradio's pages for files instead.

python tools/web_demo.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.serve import web_demo

if __name__ == "__main__":
    run_command(web_demo)
