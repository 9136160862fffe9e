"""Metrics against the reference's recorded figures, and their own promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.evaluation import (
    character_error_rate,
    corpus_error_rate,
    read_transcripts,
    seed_tts_error_rate,
    word_error_rate,
)
from vita_audio.evaluation.metrics import ErrorCounts, align

GOLDENS = Path(__file__).parents[1] / "goldens" / "data" / "metrics"
COUNTERS = {
    "wer_char1_v1": word_error_rate,
    "cer_char1_v1": character_error_rate,
    "wer_char0_v1": lambda ref, hyp: word_error_rate(ref, hyp, split_ideographs=False),
    "wer_char1_cs1": lambda ref, hyp: word_error_rate(ref, hyp, case_sensitive=True),
}
# The recorded scripts lose or garble utterances here (section 10, bugs 14 to 16).
# Done right: (reference tokens, errors).
CORRECTED_FILES = {
    "hyp_missing_utterance": (8, 4),
    "control_char": (3, 1),
    "private_use_char": (2, 1),
    "control_glued_to_word": (2, 1),
    "bom_in_ref": (3, 0),
    "line_separator_u2028_in_hyp": (3, 0),
    "line_separator_u2028_in_ref": (3, 0),
    "vertical_tab_in_hyp": (3, 0),
    "x85_in_hyp": (3, 0),
    "hyp_contains_newline": (7, 2),
}
REFUSED_FILES = {
    "duplicate_hyp_last_wins",
    "duplicate_ref_counted_twice",
    "hyp_newline_then_number_clobbers_other_utterance",
}
ID_CUT_BY_THE_SCRIPT = {"chinese_id": (4, 1)}


def read_lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (GOLDENS / name).read_bytes().split(b"\n") if line]


def counts_of(golden: dict) -> ErrorCounts:
    return ErrorCounts(golden["S"], golden["D"], golden["I"], golden["N"])


@pytest.mark.parametrize("name", COUNTERS)
def test_error_counts_equal_the_recorded_ones(name):
    total = ErrorCounts()
    for row in read_lines("wer_pairs.jsonl"):
        counts = COUNTERS[name](row["ref"], row["hyp"])
        assert counts == counts_of(row[name]), row
        assert round(counts.rate * 100, 2) == pytest.approx(row[name]["wer"], abs=0.0051)
        total += counts
    overall = json.loads((GOLDENS / "wer_overall.json").read_text())[name]["overall"]
    assert total == counts_of(overall)
    assert f"{total.rate * 100:.2f}" == f"{overall['wer']:.2f}"


@pytest.mark.parametrize("case", read_lines("wer_file_level.jsonl"), ids=lambda case: case["name"])
def test_transcript_files_score_as_recorded_or_as_corrected(case, tmp_path):
    reference_path, hypothesis_path = tmp_path / "ref.txt", tmp_path / "hyp.txt"
    reference_path.write_bytes(case["ref_file"].encode())
    hypothesis_path.write_bytes(case["hyp_file"].encode())
    if case["name"] in REFUSED_FILES:
        with pytest.raises(ValueError, match="occurs twice"):
            corpus_error_rate(read_transcripts(reference_path), read_transcripts(hypothesis_path))
        return
    result = corpus_error_rate(read_transcripts(reference_path), read_transcripts(hypothesis_path))
    corrected = {**CORRECTED_FILES, **ID_CUT_BY_THE_SCRIPT}.get(case["name"])
    if corrected is None:
        assert result.counts == counts_of(case["wer_char1_v1"]["overall"])
    else:
        assert (result.counts.reference_tokens, result.counts.errors) == corrected


def test_missing_hypotheses_are_deletions_and_the_published_figure_is_also_given():
    references = {"0": "a b c", "1": "d e f", "2": "g h"}
    result = corpus_error_rate(references, {"0": "a b c", "1": None, "2": "g x"})
    assert result.counts == ErrorCounts(1, 3, 0, 8)
    assert result.answered == ErrorCounts(1, 0, 0, 5)
    assert result.missing == ("1",)


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_alignment_cost_is_the_levenshtein_distance(reference, hypothesis):
    from rapidfuzz.distance import Levenshtein

    counts = align(reference, hypothesis)
    assert counts.errors == Levenshtein.distance(reference, hypothesis)
    assert counts.insertions - counts.deletions == len(hypothesis) - len(reference)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_seed_tts_rates_equal_the_recorded_ones(language):
    golden = json.loads((GOLDENS / "seed_tts_wer.json").read_text(encoding="utf-8"))[language]
    rates = []
    for pair in golden["pairs"]:
        counts = seed_tts_error_rate(pair["text_ref"], pair["transcription"], language)
        assert counts.rate == pytest.approx(pair["wer"]), pair
        rates.append(counts.rate)
    assert round(sum(rates) / len(rates) * 100, 3) == golden["average_wer_percent_rounded3"]


def test_seed_tts_takes_tabs_and_line_breaks_for_spaces():
    assert seed_tts_error_rate("good morning all", "good\tmorning\nall", "en").errors == 0
    assert seed_tts_error_rate("早上好", "早\n上\t好", "zh").errors == 0


def test_seed_tts_refuses_a_reference_without_words():
    with pytest.raises(ValueError, match="no words"):
        seed_tts_error_rate("...", "x", "en")
    with pytest.raises(ValueError, match="language"):
        seed_tts_error_rate("a", "a", "fr")


def test_a_corpus_without_reference_words_has_no_rate():
    for references in ({}, {"1": ""}, {"1": "。", "2": "  "}):
        with pytest.raises(ValueError, match="the references contain no words"):
            _ = corpus_error_rate(references, {"1": "anything"}).rate
