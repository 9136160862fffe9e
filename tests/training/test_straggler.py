"""A process that is slower than the others is named, with its machine."""

import socket
from pathlib import Path

import pytest

from vita_audio.training.straggler import describe_straggler

REPOSITORY = Path(__file__).resolve().parents[2]

SLOW = """
import os, time
from vita_audio.cli import finetune

open_model = finetune.open_model

def open_slow_model(*args):
    model = open_model(*args)
    if os.environ["RANK"] == "1":
        model.register_forward_pre_hook(lambda *_: time.sleep(1.0))
    return model

finetune.open_model = open_slow_model
finetune.main()
"""


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        ([1.0, 1.1, 1.6, 1.0], 2),
        ([1.0, 1.1, 1.4, 1.0], None),
        ([0.001, 0.004], None),  # too little to matter
        ([2.0, 1.0], 0),
        ([1.0], None),
    ],
)
def test_only_a_process_far_beyond_the_median_is_named(seconds, named):
    line = describe_straggler(seconds, [f"node{rank}" for rank in range(len(seconds))])
    if named is None:
        assert line is None
    else:
        assert line.startswith(f"rank {named} on node{named} is slow: {seconds[named]:.2f} s a step")


@pytest.mark.slow
def test_a_slow_process_is_named_in_the_log(tiny_world):
    (tiny_world.root / "slow.py").write_text(SLOW)
    options = tiny_world.options(tiny_world.root / "slow", max_steps=3, save_steps=3, ddp_backend="gloo")
    run = tiny_world.launch(2, tiny_world.root / "slow.py", *options)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stderr.splitlines() if " is slow: " in line]
    # Of the first step the loader's start is a part, which may be slow on either.
    assert len(lines) >= 2
    assert f"rank 1 on {socket.gethostname()} is slow: 1." in lines[-1]
