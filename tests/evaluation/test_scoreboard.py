"""What readers see: one narrow table per test set, nothing pooled."""

from __future__ import annotations

from vita_audio.evaluation.scoreboard import columns, markdown

ROW = {
    "stage": "stage4",
    "mode": "boost",
    "decoding": "greedy",
    "sets": {
        "clean": {"task": "asr", "items": 80},
        "other": {"task": "asr", "items": 40},
        "libritts": {"task": "tts", "items": 80},
    },
    "notes": ["clean: 3 of 80 prompts are not worded as in the training data"],
    "clean.asr_wer": 0.0312,
    "clean.asr_cer": 0.01,
    "other.asr_wer": 0.5,
    "other.asr_cer": 0.25,
    "tts_wer": 0.115,
    "tts_floor_wer": 0.052,
    "tts_natural_wer": 0.001,
    "tokens_per_second": 919.4,
    "first_chunk_seconds": 0.0099,
}


def test_every_test_set_has_its_own_table():
    text = markdown([ROW, ROW | {"mode": "turbo", "other.asr_wer": None, "other.asr_cer": None}])
    blocks = {block.splitlines()[0]: block.splitlines()[2:] for block in text.split("### ")[1:]}
    assert list(blocks) == [
        "ASR · clean · 80 items",
        "ASR · other · 40 items",
        "TTS · libritts · 80 items",
        "speed",
    ]
    assert blocks["ASR · clean · 80 items"][:4] == [
        "| stage  | mode  | WER % | CER % |",
        "| ------ | ----- | ----: | ----: |",
        "| stage4 | boost |   3.1 |   1.0 |",
        "| stage4 | turbo |   3.1 |   1.0 |",
    ]
    assert blocks["ASR · other · 40 items"][2:3] == ["| stage4 | boost |  50.0 |  25.0 |"]
    assert "turbo" not in "".join(blocks["ASR · other · 40 items"])
    assert blocks["TTS · libritts · 80 items"][2] == "| stage4 | boost |  11.5 |           5.2 |       0.1 |"
    assert blocks["speed"][2] == "| stage4 | boost |      919 |             10 |"


def test_the_table_is_readable_in_80_columns_and_says_what_matters():
    text = markdown([ROW, ROW | {"decoding": "published"}])
    assert max(map(len, text.splitlines())) <= 80
    assert "3 of 80 prompts are not worded" in " ".join(text.split())
    assert "| stage4 | boost | published |" in text


def test_a_note_about_several_sets_is_printed_once():
    heard = [f"{name}: heard by whisper" for name in ("clean", "other", "clean")]
    assert "* clean, other: heard by whisper\n" in markdown(
        [ROW | {"notes": heard}, ROW | {"notes": heard[:1]}]
    )


def test_columns_of_several_sets_keep_apart():
    titles = [column.title for column in columns([ROW])]
    assert titles == [
        "stage", "mode", "ASR clean WER %", "ASR clean CER %", "ASR other WER %", "ASR other CER %",
        "TTS WER %", "TTS codec floor %", "TTS natural %", "tokens/s", "first chunk ms",
    ]  # fmt: skip


def test_rows_that_name_no_sets_are_shown():
    old = {"stage": "s", "mode": "boost", "asr_wer": 0.5, "sqa_s2t_accuracy": None}
    assert [column.title for column in columns([old])] == ["stage", "mode", "ASR WER %"]
    assert "### ASR\n" in markdown([old])
