"""A disk that fills up while a checkpoint is written costs nothing but that checkpoint."""

import shutil

import pytest
from disks import full_disk

from vita_audio.cli import finetune
from vita_audio.cli.launch import REFUSED
from vita_audio.training import last_complete_checkpoint

IN_THE_WEIGHTS, IN_THE_OPTIMIZER = 1_000_000, 5_000_000


def refusal(options, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        finetune.main(options)
    assert end.value.code == REFUSED
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.split("finetune_sts: ")[-1]


@pytest.mark.parametrize("free", [IN_THE_WEIGHTS, IN_THE_OPTIMIZER])
def test_the_first_checkpoint_is_reported_in_one_line_and_never_complete(tiny_world, tmp_path, capsys, free):
    with full_disk(free):
        message = refusal(tiny_world.options(tmp_path / "out", max_steps=2, save_steps=1), capsys)
    assert "checkpoint-1: cannot be written: " in message
    assert "continues from the beginning" in message
    assert not list(tmp_path.glob("out/checkpoint-*/checkpoint.complete"))


def test_the_last_whole_checkpoint_stays_and_the_run_continues_from_it(tiny_world, tmp_path, capsys):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    finetune.main(tiny_world.options(run, max_steps=2, save_steps=2))
    shutil.copytree(run, undisturbed)
    for free in (IN_THE_WEIGHTS, IN_THE_OPTIMIZER):
        with full_disk(free):
            message = refusal(tiny_world.options(run, max_steps=3, save_steps=1), capsys)
        assert "checkpoint-3: cannot be written: " in message
        assert "continues from checkpoint-2, which is whole" in message
        assert last_complete_checkpoint(run) == run / "checkpoint-2"
    for folder in (run, undisturbed):
        finetune.main(tiny_world.options(folder, max_steps=3, save_steps=1))
    assert tiny_world.logged(run) == tiny_world.logged(undisturbed)
