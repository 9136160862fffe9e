"""What a shell still holds from other work does not reach the quickstart's stages and scores."""

import os
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = (REPOSITORY / "scripts/quickstart.sh").read_text()
MACHINE = {
    *("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHON", "PYTHONPATH"),
    *("HF_DATASETS_CACHE", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR"),
}
"""Read from the shell on purpose."""
INTERNAL = {"PREVIOUS_STAGE", "DEFAULT_AUDIO_MODEL"}
"""What a stage script tells launch.sh."""


def variables_read() -> set[str]:
    """What the scripts that the quickstart calls take from the environment."""
    scripts = [
        REPOSITORY / "scripts/deepspeed/evaluate_sts.sh",
        *(REPOSITORY / "scripts/deepspeed/sts_qwen25").glob("*.sh"),
        REPOSITORY / "scripts/deepspeed/devices.sh",
    ]
    read = {name for file in scripts for name in re.findall(r"\$\{([A-Z][A-Z0-9_]*):?[-+]", file.read_text())}
    return read | {"ASR_JSON", "TTS_JSON", "SQA_JSON"}  # read by a name that is put together


def test_no_variable_of_the_shell_reaches_a_stage_or_the_evaluation():
    # From what the script forgets to what it sets, as it stands there, in a shell that holds everything.
    block = QUICKSTART[QUICKSTART.index("unset MODEL_NAME") : QUICKSTART.index("scaled() {")]
    command = f"set -euo pipefail; REPOSITORY={REPOSITORY} size=full variant=plus; {block} env"
    held = dict.fromkeys(variables_read() - MACHINE - INTERNAL, "from-the-shell")
    run = subprocess.run(
        ["bash", "-c", command], env={**os.environ, **held}, capture_output=True, text=True, check=True
    )
    left = {line.split("=")[0] for line in run.stdout.splitlines() if line.endswith("=from-the-shell")}
    # Set for each call by the lines that follow.
    given = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", QUICKSTART[QUICKSTART.index("scaled() {") :]))
    assert len(held) > 40
    assert left <= given - {"MODEL_NAME_OR_PATH", "AUDIO_MODEL_NAME_OR_PATH", "OUTPUT_DIR"}
    assert not left & {"AUDIO_MODEL_FREEZE", "MTP_LEARNING_RATE_MULTIPLIER"}, "not given to every stage"


@pytest.mark.parametrize("variant", ["base", "plus"])
def test_a_smoke_run_stays_short_whatever_the_variant(variant):
    block = QUICKSTART[QUICKSTART.index("QUICKSTART_CONFIG=") : QUICKSTART.index("# Two rows a step")]
    command = (
        f"set -euo pipefail; REPOSITORY={REPOSITORY} size=smoke variant={variant}; {block} echo $STAGE1_STEPS"
    )
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert run.stdout == "10\n"
