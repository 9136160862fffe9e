"""What a shell still holds from other work does not reach the quickstart's stages and scores."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MACHINE = {"CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHON", "PYTHONPATH"}
"""Read from the shell on purpose."""


def test_every_variable_that_the_scripts_read_is_set_or_unset():
    scripts = [
        REPOSITORY / "scripts/deepspeed/evaluate_sts.sh",
        *(REPOSITORY / "scripts/deepspeed/sts_qwen25").glob("*.sh"),
        REPOSITORY / "scripts/deepspeed/devices.sh",
    ]
    read = {
        name
        for script in scripts
        for name in re.findall(r"\$\{!?([A-Z][A-Z0-9_]*):?[-+]", script.read_text())
    }
    read |= {"ASR_JSON", "TTS_JSON", "SQA_JSON"}  # read by a name that is put together
    text = (REPOSITORY / "scripts/quickstart.sh").read_text()
    text += (REPOSITORY / "configs/quickstart/full.env").read_text()
    own = {"DEFAULT_AUDIO_MODEL", "PREVIOUS_STAGE"}  # of the stage scripts, not of the shell
    handled = set(re.findall(r"\b([A-Z][A-Z0-9_]+)\b", text))
    assert len(read) > 40
    assert read - own - MACHINE - handled == set()


def test_a_smoke_run_of_plus_is_a_smoke_run():
    """The variant's file must not bring back what makes a run long."""
    smoke = (REPOSITORY / "configs/quickstart/smoke.env").read_text()
    plus = (REPOSITORY / "configs/quickstart/plus.env").read_text()
    sizes = {line.split("=")[0] for line in smoke.splitlines() if "=" in line}
    assert not {name for name in sizes if name.endswith("_STEPS") and f"\n{name}=" in plus}
