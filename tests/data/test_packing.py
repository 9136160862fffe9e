"""Packing: fill, fairness, nothing lost; and rows as tensors, against the goldens."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.constants import IGNORE_INDEX
from vita_audio.data import Example, build_example, pack_lengths
from vita_audio.data.collator import collate_rows
from vita_audio.data.packing import RowPacker

LISTS = ["lognormal_mean180_sigma0.8", "lognormal_mean180_sigma1.4"]


@pytest.fixture(scope="module")
def fill_lengths(goldens) -> dict[str, list[int]]:
    return json.loads((goldens.folder / "packing" / "fill_lengths.json").read_text())


@pytest.mark.parametrize("name", LISTS)
def test_rows_are_almost_completely_full(fill_lengths, name):
    lengths = fill_lengths[name]
    rows = pack_lengths(lengths, 8192)
    assert sum(lengths) / (len(rows) * 8192) >= 0.998
    assert len(rows) == -(-sum(lengths) // 8192)  # no packing can need fewer


@given(
    st.integers(1, 200).flatmap(
        lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(0, capacity), max_size=200))
    ),
    st.integers(1, 20),
    st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_every_document_is_in_one_row_and_no_row_is_too_long(case, open_rows, patience):
    capacity, lengths = case
    rows = pack_lengths(lengths, capacity, open_rows, patience)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert all(row == sorted(row) for row in rows)


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="101 tokens does not fit a row of 100"):
        pack_lengths([5, 101], 100)


@pytest.mark.parametrize("name", LISTS)
def test_no_document_waits_long_whatever_its_source_or_length(fill_lengths, name):
    lengths, sources = fill_lengths[name], fill_lengths[f"{name}_source40"]
    packer: RowPacker[int] = RowPacker(8192)
    waits: dict[int, int] = {}
    for index, length in enumerate(lengths):
        for document in packer.add(index, length) or ():
            waits[document] = index - document
    mean = statistics.mean(waits.values())
    assert max(waits.values()) < 0.1 * len(lengths)

    def assert_not_late(group: list[int]) -> None:
        error = statistics.pstdev(waits.values()) / len(group) ** 0.5  # of the mean of so many
        assert abs(statistics.mean(waits[document] for document in group) - mean) < 0.1 * mean + 4 * error

    for source in set(sources):
        assert_not_late([document for document in waits if sources[document] == source])
    by_length = sorted(waits, key=lambda document: lengths[document])
    for part in range(10):
        assert_not_late(by_length[part * len(waits) // 10 : (part + 1) * len(waits) // 10])


def test_a_waiting_row_is_finished_after_patience_rows_even_if_another_is_fuller():
    packer: RowPacker[str] = RowPacker(100, open_rows=2, patience=3)
    packer.add("waiting", 10)
    finished = [packer.add(f"long {index}", 95) for index in range(12)]
    assert any("waiting" in row for row in finished if row)


def test_a_document_goes_into_the_fullest_row_that_has_room():
    packer: RowPacker[str] = RowPacker(100, open_rows=3)
    for name, length in (("a", 60), ("b", 70), ("c", 80)):
        assert packer.add(name, length) is None
    assert packer.add("d", 25) is None  # c has no room, b is fuller than a
    assert [row.documents for row in packer.rows] == [["a"], ["b", "d"], ["c"]]
    assert packer.add("e", 40) == ["a", "e"]  # fills a row to the last token, which finishes it


def test_if_no_row_has_room_the_fullest_is_finished():
    packer: RowPacker[str] = RowPacker(100, open_rows=3)
    for name, length in (("a", 60), ("b", 80), ("c", 70)):
        packer.add(name, length)
    assert packer.add("d", 50) == ["b"]
    assert [row.documents for row in packer.rows] == [["a"], ["c"], ["d"]]


def test_rows_age_by_one_with_every_row_that_is_finished():
    packer: RowPacker[str] = RowPacker(100, open_rows=2, patience=3)
    packer.add("waiting", 10)
    assert packer.add("whole", 100) == ["whole"]  # a document as long as a row is a row
    assert [row.age for row in packer.rows] == [1]
    packer.add("a", 95)
    assert [row.age for row in packer.rows] == [1, 0]
    assert packer.add("b", 95) == ["a"]
    assert [row.age for row in packer.rows] == [2, 0]
    assert packer.add("c", 95) == ["b"]
    assert [row.age for row in packer.rows] == [3, 0]
    assert packer.add("d", 95) == ["waiting"]  # it has waited for three rows
    assert [row.age for row in packer.rows] == [1, 0]


def golden_documents(case: dict) -> list[Example]:
    documents = []
    for index, length in enumerate(case["lengths"]):
        ids = [1000 * (index + 1) + offset for offset in range(length)]
        labels = [IGNORE_INDEX if offset % 3 == 0 else token for offset, token in enumerate(ids)]
        documents.append(Example(ids, labels))
    return documents


def test_rows_as_tensors_equal_the_golden_packs(goldens):
    checked = 0
    for case in goldens.lines("packing/small_packs.jsonl"):
        options = case["options"]
        if (
            not options.get("reset_position_ids")
            or options.get("variable_length")
            or options.get("shift_token")
        ):
            continue
        documents = golden_documents(case)
        for pack in case["emitted"]:
            if not isinstance(pack, dict) or "sample_order" not in pack:
                continue
            row = [documents[index] for index in pack["sample_order"]]
            batch = collate_rows([row], options["max_padding_length"], options["pad_token_id"])
            for name in ("input_ids", "labels", "position_ids"):
                if name in pack:
                    assert batch[name].tolist() == [pack[name]], (case["name"], name)
            checked += 1
    assert checked > 20


def test_one_open_row_gives_the_golden_rows_and_loses_no_document(goldens):
    case = goldens.lines("packing/small_packs.jsonl")[0]
    golden_rows = [pack["sample_order"] for pack in case["emitted"] if pack]
    rows = pack_lengths(case["lengths"], case["options"]["max_padding_length"], open_rows=1, patience=1_000)
    assert rows[: len(golden_rows)] == golden_rows
    assert sorted(index for row in rows for index in row) == list(range(len(case["lengths"])))


def test_audio_positions_are_shifted_with_their_document_also_for_the_first(goldens):
    for case in goldens.lines("packing/audio_packs.jsonl"):
        kind = case["audio_tokenizer_type"]
        packer: RowPacker[Example] = RowPacker(case["max_padding_length"], open_rows=1, patience=1_000)
        rows = []
        for sample in case["samples"]:
            try:
                example = build_example(sample, goldens.tokenizer(kind), goldens.codec(kind), case["ratio"])
                rows.append(packer.add(example, len(example)))
            except ValueError:
                continue  # the bad samples, and those too long for the row
        rows = [row for row in [*rows, *packer.flush()] if row]
        packs = [pack for pack in case["packs"] if pack.get("input_ids")]
        assert len(rows) >= len(packs) > 0
        for row, pack in zip(rows, packs, strict=False):
            batch = collate_rows([row], case["max_padding_length"], goldens.tokenizer(kind).pad_token_id)
            for name in ("input_ids", "labels", "position_ids"):
                assert batch[name].tolist() == [pack[name]], (case["name"], name)
            firsts = [index[1, 0, 0].item() for index in batch.get("audio_indices", [])]
            assert firsts == pack.get("audio_first_positions_correct", []), case["name"]


def test_batches_of_several_rows_keep_each_audio_with_its_row():
    def document(length: int, frames: int | None = None) -> Example:
        example = Example(list(range(length)), [IGNORE_INDEX] * length)
        if frames is not None:
            example.features.append(torch.full((frames, 3), float(frames)))
            example.feature_positions.append(list(range(2, 2 + frames + 4)))
        return example

    rows = [[document(5), document(12, 3)], [document(9)], [document(10, 1), document(11, 2), document(4)]]
    batch = collate_rows(rows, 30, 7)
    assert batch["input_ids"].shape == (3, 30)
    assert [audio[0, 0].item() for audio in batch["audios"]] == [3, 1, 2]
    placed = [(index[0].unique().item(), index[1, 0, 0].item()) for index in batch["audio_indices"]]
    assert placed == [(0, 7), (2, 2), (2, 12)]
    assert "audios" not in collate_rows(rows[1:2], 30, 7)
