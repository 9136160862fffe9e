"""A checkpoint counts only when every rank has written its part."""

import pytest

from vita_audio.training.checkpoints import (
    last_complete_checkpoint,
    load_loader_states,
    mark_complete,
    mark_incomplete,
    save_loader_state,
)


def make_checkpoint(run, step, complete=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    if complete:
        mark_complete(folder)
    return folder


def test_the_newest_complete_checkpoint_is_chosen_by_step_not_by_name(tmp_path):
    make_checkpoint(tmp_path, 90)
    newest = make_checkpoint(tmp_path, 100)
    assert last_complete_checkpoint(tmp_path) == newest


def test_a_torn_checkpoint_is_passed_over(tmp_path, caplog):
    whole = make_checkpoint(tmp_path, 10)
    torn = make_checkpoint(tmp_path, 20, complete=False)
    assert last_complete_checkpoint(tmp_path) == whole
    assert torn.name in caplog.text


def test_a_checkpoint_written_again_is_torn_until_it_is_whole(tmp_path):
    folder = make_checkpoint(tmp_path, 10)
    mark_incomplete(folder)
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_written_again_by_fewer_ranks_keeps_no_state_of_the_others(tmp_path):
    for rank in range(4):
        save_loader_state(tmp_path, rank, {"rank": rank})
    mark_incomplete(tmp_path)
    for rank in range(2):
        save_loader_state(tmp_path, rank, {"rank": rank})
    assert len(load_loader_states(tmp_path)) == 2


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "absent") is None


def test_loader_states_come_back_in_rank_order(tmp_path):
    for rank in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9):
        save_loader_state(tmp_path, rank, {"rank": rank})
    assert [state["rank"] for state in load_loader_states(tmp_path)] == list(range(11))


def test_a_checkpoint_without_loader_state_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="loader_state"):
        load_loader_states(tmp_path)
