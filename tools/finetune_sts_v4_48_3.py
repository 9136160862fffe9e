"""The published name of finetune_sts.py."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("finetune_sts.py")), run_name="__main__")
