"""A checkpoint counts only when every rank has written its part."""

from itertools import islice

import pytest
import torch
from transformers import AutoTokenizer

from vita_audio.data import DataConfig, build_train_loader, extend_tokenizer
from vita_audio.training.checkpoints import (
    CheckpointStateError,
    last_complete_checkpoint,
    load_loader_states,
    mark_complete,
    mark_incomplete,
    save_loader_state,
    writers,
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


def test_an_incomplete_checkpoint_is_skipped(tmp_path, caplog):
    whole = make_checkpoint(tmp_path, 10)
    torn = make_checkpoint(tmp_path, 20, complete=False)
    assert last_complete_checkpoint(tmp_path) == whole
    assert torn.name in caplog.text


def test_a_rewritten_checkpoint_is_incomplete_until_it_is_finished(tmp_path):
    folder = make_checkpoint(tmp_path, 10)
    mark_incomplete(folder)
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_rewritten_by_fewer_ranks_keeps_no_state_of_the_others(tmp_path):
    for rank in range(4):
        save_loader_state(tmp_path, rank, {"rank": rank})
    mark_incomplete(tmp_path)
    for rank in range(2):
        save_loader_state(tmp_path, rank, {"rank": rank})
    assert len(load_loader_states(tmp_path)) == 2


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "absent") is None


def test_loader_states_are_returned_in_rank_order(tmp_path):
    for rank in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9):
        save_loader_state(tmp_path, rank, {"rank": rank})
    assert [state["rank"] for state in load_loader_states(tmp_path)] == list(range(11))


def test_a_checkpoint_without_loader_state_is_refused(tmp_path):
    with pytest.raises(CheckpointStateError, match="loader_state"):
        load_loader_states(tmp_path)


def test_a_pickled_loader_state_is_never_opened_and_the_error_says_so(tmp_path):
    (tmp_path / "loader_state").mkdir()
    (tmp_path / "loader_state" / "rank_00000.pt").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointStateError, match="earlier version, which pickled the position in the data"):
        load_loader_states(tmp_path)


def test_a_damaged_loader_state_is_named(tmp_path):
    save_loader_state(tmp_path, 0, {"rank": 0})
    (tmp_path / "loader_state" / "rank_00001.json").write_text("{")
    with pytest.raises(CheckpointStateError, match=r"rank_00001\.json: not valid JSON"):
        load_loader_states(tmp_path)


def test_the_number_of_writers_is_known(tmp_path):
    for rank in range(3):
        save_loader_state(tmp_path, rank, {"rank": rank})
    assert writers(tmp_path) == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_a_real_loader_is_plain_json_and_continues_with_the_same_rows(
    tiny_world, tmp_path, num_workers
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_world.root / "base")
    extend_tokenizer(tokenizer, False, 16384)

    def open_loader():
        config = DataConfig(
            tiny_world.root / "mix.yaml", seq_length=128, num_workers=num_workers, open_rows=4
        )
        return build_train_loader(config, tokenizer, None)

    loader = open_loader()
    rows = iter(loader)
    for _ in range(5):
        next(rows)
    state = loader.state_dict()
    save_loader_state(tmp_path, 0, state)
    (restored,) = load_loader_states(tmp_path)
    assert restored == state
    assert [file.suffix for file in (tmp_path / "loader_state").iterdir()] == [".json"]
    continued = open_loader()
    continued.load_state_dict(restored)
    for mine, other in islice(zip(rows, continued, strict=False), 5):
        assert torch.equal(mine["input_ids"], other["input_ids"])
