"""Preflight with two real processes: a good set-up passes, and each broken one is named in one line."""

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

BREAK = '''
import os, sys, time, pathlib, torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from vita_audio.cli import preflight

how, rank = sys.argv.pop(1), int(os.environ["RANK"])

def attend(module, query, key, value, mask, **kwargs):
    """FlashAttention that forgets the causal mask, or a process that never answers."""
    if how == "hang" and rank == 1:
        time.sleep(3600)
    if how == "wrong_numbers":
        value = value.flip(2)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

if how.endswith("flash"):
    import runpy
    runpy.run_path(os.environ["FLASH_STAND_IN"])["install"](wrong=how == "wrong_flash")
    if how == "flash":  # as it is chosen on a GPU
        preflight.choose_numerics = lambda *_: (torch.bfloat16, "flash_attention_2")
AttentionInterface.register("stand_in", attend)
AttentionMaskInterface.register("stand_in", sdpa_mask)
if how == "missing_file" and rank == 1:
    root = sys.argv.index("--data_root") + 1
    sys.argv[root] = str(pathlib.Path(sys.argv[root]) / "other_machine")
preflight.main()
'''


@pytest.fixture(scope="module")
def world(tiny_world):
    """The tiny world with a second file, which a folder of another machine lacks."""
    root = tiny_world.root
    (root / "more.jsonl").write_text((root / "text.jsonl").read_text())
    (root / "mixes").mkdir()
    (root / "mixes/two.yaml").write_text("dataset:\n  text:\n    data_paths: [text.jsonl, more.jsonl]\n")
    (root / "other_machine").mkdir()
    (root / "other_machine/text.jsonl").write_text((root / "text.jsonl").read_text())
    (root / "break.py").write_text(BREAK)
    return tiny_world


def check(world, how: str, *more: object, **settings: str) -> subprocess.CompletedProcess:
    options = world.options(
        world.root / "checked", dataset_name=world.root / "mixes/two.yaml", data_root=world.root
    )
    settings = {"PREFLIGHT_ATTENTION": "sdpa eager stand_in", "PREFLIGHT_TIMEOUT": "60", **settings}
    return world.launch(2, world.root / "break.py", how, *options, *more, **settings)


FLASH = {
    "PREFLIGHT_ATTENTION": "sdpa eager flash_attention_2",
    "FLASH_STAND_IN": str(REPOSITORY / "tests/models/flash_stand_in.py"),
}


def verdicts(run: subprocess.CompletedProcess) -> dict[str, str]:
    lines = [line.split(maxsplit=2) for line in run.stdout.splitlines()]
    return {line[1]: line[0] for line in lines if line and line[0] in ("ok", "FAIL", "skip")}


def test_a_good_setup_passes_every_check_and_leaves_nothing(world):
    run = check(world, "well")
    assert run.returncode == 0, run.stdout + run.stderr
    assert set(verdicts(run).values()) == {"ok"}, run.stdout
    assert len(verdicts(run)) == 10
    assert "equal with sdpa, eager, stand_in" in run.stdout
    assert not (world.root / "checked").exists()
    assert not list(world.root.rglob(".preflight*"))


@pytest.mark.parametrize(
    ("how", "more", "failed", "said"),
    [
        ("wrong_numbers", (), "step", "stand_in attention is"),
        ("missing_file", (), "data", "more.jsonl"),
        ("well", ("--save_total_limit", "100000000"), "disk", "GB free, but the checkpoints need"),
        (
            "well",
            ("--audio_tokenizer_type", "mel_vq", "--audio_tokenizer_path", "base"),
            "codec",
            "base",
        ),
    ],
)
def test_each_broken_setup_is_named_in_one_line(world, how, more, failed, said):
    run = check(world, how, *more)
    assert run.returncode == 78, run.stdout + run.stderr
    assert [name for name, verdict in verdicts(run).items() if verdict == "FAIL"] == [failed], run.stdout
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith(f"preflight: 1 of 10 checks failed: {failed}: ")
    assert said in line
    assert "Traceback" not in run.stderr


def test_flash_attention_is_compared_with_sdpa_and_wrong_numbers_are_named(world):
    run = check(world, "flash", "--bf16", "True", **FLASH)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "equal with flash_attention_2, sdpa, eager" in run.stdout
    wrong = check(world, "wrong_flash", "--bf16", "True", **FLASH)
    assert wrong.returncode == 78, wrong.stdout + wrong.stderr
    line = wrong.stderr.strip().splitlines()[-1]
    assert line.startswith("preflight: 1 of 10 checks failed: step: ")
    assert "with flash_attention_2 attention" in line


def test_a_process_that_hangs_is_named_and_everything_ends(world):
    run = check(world, "hang", PREFLIGHT_TIMEOUT="25")
    assert run.returncode == 78, run.stdout + run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("preflight: step: a process hangs for 25 s: ")
    assert "1" in line.rsplit("anks", 1)[-1]


def test_a_stage_with_preflight_is_checked_and_then_trained(tiny_world):
    base = str(tiny_world.root / "base")
    run = tiny_world.run_stage("stage1", MODEL_NAME_OR_PATH=base, PREFLIGHT="1", MAX_STEPS="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "ok    memory" in run.stdout
    assert (tiny_world.result("stage1") / "stage.complete").is_file()
    settings = {"MODEL_NAME_OR_PATH": base, "PREFLIGHT": "1", "OUTPUT_ROOT": str(tiny_world.root / "none")}
    refused = tiny_world.run_stage("stage1", "--save_total_limit", "100000000", **settings)
    assert refused.returncode == 78, refused.stdout + refused.stderr
    assert not (tiny_world.root / "none").exists(), "nothing was trained"
