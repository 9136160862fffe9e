"""One run owns its folder; finished, incomplete and unfinished states are distinguished."""

import json
import os

import pytest

from vita_audio.training.checkpoints import (
    CheckpointStateError,
    delete_old_checkpoints,
    last_complete_checkpoint,
    mark_complete,
)
from vita_audio.training.run_folder import RunFolder, RunFolderError, check_input_folder


def make_checkpoint(run, step, complete=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "model.safetensors").write_text(f"weights of step {step}")
    if complete:
        mark_complete(folder)
    return folder


def finish(run, step):
    (run / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    RunFolder(run).finish()


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_second_run_is_refused_with_the_name_of_the_owner_until_the_owner_dies(
    tmp_path, owned_by_another_process
):
    with (
        owned_by_another_process(tmp_path) as owner,
        pytest.raises(RunFolderError, match=rf"process {owner.pid} on \S+ is training into this folder"),
        RunFolder(tmp_path) as folder,
    ):
        folder.lock()
    with RunFolder(tmp_path) as folder:
        folder.lock()  # a lock file that a dead run left blocks nobody
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    with RunFolder(tmp_path) as folder:
        folder.lock()


def test_rotation_keeps_the_newest_complete_checkpoints_regardless_of_incomplete_ones(tmp_path):
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 90, complete=False)
    make_checkpoint(tmp_path, 5, complete=False)
    delete_old_checkpoints(tmp_path, keep=2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]
    delete_old_checkpoints(tmp_path, keep=1)
    assert names(tmp_path) == ["checkpoint-30"]


@pytest.mark.parametrize("keep", [None, 0])
def test_without_a_limit_every_complete_checkpoint_is_kept(tmp_path, keep):
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    delete_old_checkpoints(tmp_path, keep)
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-30"
    assert len(names(tmp_path)) == 3


def test_folders_that_only_look_like_checkpoints_are_kept(tmp_path):
    for name in ("checkpoint-best", "my-checkpoint-3", "checkpoint-7-copy"):
        (tmp_path / name).mkdir()
    make_checkpoint(tmp_path, 10)
    delete_old_checkpoints(tmp_path, keep=1)
    assert len(names(tmp_path)) == 4


def test_starting_over_deletes_checkpoints_and_results_and_keeps_the_users_files(tmp_path):
    make_checkpoint(tmp_path, 10)
    make_checkpoint(tmp_path, 20, complete=False)
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "data_errors.jsonl",
        "run.json",
    ):
        (tmp_path / name).write_text("old")
    (tmp_path / "runs").mkdir()
    for name in ("log_node0.txt", "mix.yaml", "finetune.sh", "notes.md"):
        (tmp_path / name).write_text("kept")
    finish(tmp_path, 20)
    with RunFolder(tmp_path) as folder:
        folder.lock()
        folder.start_over()
    assert names(tmp_path) == [".lock", "finetune.sh", "log_node0.txt", "mix.yaml", "notes.md"]


def test_a_finished_stage_continues_when_more_steps_are_requested(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 20)
    finish(tmp_path, 20)
    folder = RunFolder(tmp_path)
    assert folder.finished_steps() == 20
    assert folder.continue_from(40) == checkpoint
    folder.reopen()
    assert folder.finished_steps() is None


def test_a_finished_stage_without_its_checkpoint_says_how_to_train_more_steps(tmp_path):
    finish(tmp_path, 20)
    with pytest.raises(
        RunFolderError, match=r"finished after 20 steps, and no checkpoint .* --model_name_or_path"
    ):
        RunFolder(tmp_path).continue_from(40)


def test_a_damaged_trainer_state_is_named(tmp_path):
    finish(tmp_path, 20)
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(
        CheckpointStateError, match=r"trainer_state\.json: does not state the number of steps"
    ):
        RunFolder(tmp_path).finished_steps()


def test_an_unfinished_stage_is_refused_as_input_but_its_complete_checkpoint_is_accepted(tmp_path):
    whole = make_checkpoint(tmp_path, 10)
    with pytest.raises(RunFolderError, match=f"this stage is not finished; .* or give {whole}"):
        check_input_folder(tmp_path, "elsewhere")
    check_input_folder(whole, "elsewhere")
    finish(tmp_path, 10)
    check_input_folder(tmp_path, "elsewhere")


def test_an_incomplete_checkpoint_is_refused_as_input(tmp_path):
    torn = make_checkpoint(tmp_path, 10, complete=False)
    (torn / "loader_state").mkdir()
    with pytest.raises(RunFolderError, match="not written completely"):
        check_input_folder(torn, "elsewhere")


def test_a_plain_model_folder_is_accepted_as_input(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_input_folder(tmp_path, "elsewhere")
