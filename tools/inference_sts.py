"""Talk to a model; see vita_audio/cli/inference.py. ``S2SInference`` is the original repository's class.

python tools/inference_sts.py --help
"""

from vita_audio.cli.arguments import run_command
from vita_audio.cli.inference import main
from vita_audio.inference.s2s import S2SInference

__all__ = ["S2SInference"]

if __name__ == "__main__":
    run_command(main)
