"""Error rates: word, character and Seed-TTS.

The pair functions count exactly as the published benchmark scripts do (section 8 of the data
specification), so figures are comparable to the paper's. Those scripts make an error when they
combine utterances: missing hypotheses vanish from the denominator.
Here :func:`corpus_error_rate` counts a missing hypothesis as deletions, and also reports the
published figure (answered utterances only).

Both sides are compared in Unicode's composed form (NFC), since the same letter may be written as one character
or as a letter and its accent.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vita_audio.evaluation.normalisers import nfc


@dataclass(frozen=True)
class ErrorCounts:
    """Edits that turn a reference into a hypothesis. Counts can be added to pool utterances."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference_tokens: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference token, 1.0 = 100%; 0.0 without reference tokens (section 8.1)."""
        return self.errors / self.reference_tokens if self.reference_tokens else 0.0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.reference_tokens + other.reference_tokens,
        )


def word_error_rate(
    reference: str, hypothesis: str, *, case_sensitive: bool = False, split_ideographs: bool = True
) -> ErrorCounts:
    """Word errors of one utterance.

    Ideographs, kana, Hangul and other caseless letters count as one word each, so the
    same function works for Mandarin (section 8.1; ``--char=1``).

    Args:
        case_sensitive: compare letters as written (``--cs=1``).
        split_ideographs: if False, words are separated by white space only (``--char=0``).
    """
    return align(
        word_tokens(reference, case_sensitive, split_ideographs),
        word_tokens(hypothesis, case_sensitive, split_ideographs),
    )


def character_error_rate(reference: str, hypothesis: str, *, case_sensitive: bool = False) -> ErrorCounts:
    """Character errors of one utterance; a word with punctuation counts as one (section 8.1)."""
    return align(
        character_tokens(reference, case_sensitive),
        character_tokens(hypothesis, case_sensitive),
    )


@dataclass(frozen=True)
class CorpusErrors:
    """Errors over a test set.

    Attributes:
        counts: counts over all references; one without hypothesis is all deletions.
        answered: counts over utterances with a hypothesis, as in the published scripts.
        missing: ids of the references without hypothesis.
    """

    counts: ErrorCounts
    answered: ErrorCounts
    missing: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Errors per reference token.

        Raises:
            ValueError: the references contain no words, so the rate is undefined.
        """
        if not self.counts.reference_tokens:
            raise ValueError("the references contain no words; there is nothing to score against")
        return self.counts.rate


def corpus_error_rate(
    references: Mapping[str, str],
    hypotheses: Mapping[str, str | None],
    *,
    characters: bool = False,
) -> CorpusErrors:
    """Pool the errors of utterances matched by id; line breaks inside a text are spaces.

    Args:
        references: id -> text.
        hypotheses: id -> text; None or no entry: the system gave no answer. Ids that are not in
            ``references`` are ignored.
        characters: character instead of word errors.
    """
    count = character_error_rate if characters else word_error_rate
    answered, unanswered, missing = ErrorCounts(), ErrorCounts(), []
    for utterance, reference in references.items():
        hypothesis = hypotheses.get(utterance)
        if hypothesis is None:
            missing.append(utterance)
            unanswered += count(_one_line(reference), "")
        else:
            answered += count(_one_line(reference), _one_line(hypothesis))
    return CorpusErrors(answered + unanswered, answered, tuple(missing))


def utterance_errors(
    reference: str, hypothesis: str | None, *, characters: bool = False
) -> tuple[float, float]:
    """Errors and reference tokens of one utterance; see :func:`corpus_error_rate`."""
    counts = corpus_error_rate({"": reference}, {"": hypothesis}, characters=characters).counts
    return float(counts.errors), float(counts.reference_tokens)


def read_transcripts(path: str | Path) -> dict[str, str]:
    """Read ``ID TEXT`` lines, the files of the published scripts.

    The id is everything before the first white space. Lines end only at LF or CR LF, so
    other separators stay inside their utterance.

    Raises:
        ValueError: an id occurs twice.
    """
    transcripts: dict[str, str] = {}
    lines = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        utterance, _, text = line.strip().partition(" ")
        if utterance in transcripts:
            raise ValueError(
                f"{path}:{number}: id {utterance!r} occurs twice; give each utterance its own id"
            )
        transcripts[utterance] = text.strip()
    return transcripts


def seed_tts_error_rate(reference: str, transcript: str, language: str) -> ErrorCounts:
    """Errors of one Seed-TTS utterance (section 8.3); the benchmark's figure is the mean of the rates.

    Args:
        reference: the text that was to be spoken.
        transcript: the recogniser's output.
        language: ``"zh"`` (errors per character) or ``"en"`` (errors per word).

    Raises:
        ValueError: unknown language, or a reference without words.
    """
    if language not in ("zh", "en"):
        raise ValueError(f"language is {language!r}; Seed-TTS supports 'zh' and 'en'")
    if language == "zh":
        transcript = simplified_chinese(transcript)
    reference_tokens = seed_tts_tokens(reference, language)
    if not reference_tokens:
        raise ValueError(f"the reference {reference!r} has no words left without its punctuation")
    return align(reference_tokens, seed_tts_tokens(transcript, language))


def seed_tts_tokens(text: str, language: str) -> list[str]:
    """Tokens that Seed-TTS compares: punctuation is deleted, not replaced by a space (section 8.3).

    Tabs and line breaks are spaces; the published scripts break on them (bug 20).
    """
    text = nfc(text).translate(_SEED_TTS_PUNCTUATION)
    text = " ".join(text) if language == "zh" else text.lower()
    return [token for token in text.split(" ") if token]


def simplified_chinese(text: str) -> str:
    """Traditional to mainland simplified characters (zhconv ``zh-cn``)."""
    import zhconv  # zhconv loads its tables on import; only Mandarin needs them

    return zhconv.convert(text, "zh-cn")


def word_tokens(text: str, case_sensitive: bool = False, split_ideographs: bool = True) -> list[str]:
    """Words as the published script splits them (section 8.1)."""
    text = nfc(text)
    return _normalise_tokens(_split_words(text) if split_ideographs else text.split(), case_sensitive)


def character_tokens(text: str, case_sensitive: bool = False) -> list[str]:
    """Characters as the published script splits them: only fully alphanumeric words are split."""
    return [
        character
        for token in word_tokens(text, case_sensitive)
        for character in (token if token.isalnum() else [token])
    ]


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Levenshtein alignment with unit costs; ties prefer deletion, then insertion.

    The tie rule does not change the rate, only how it splits into kinds. One numpy operation
    per reference token: insertions along a row are a running minimum of cost minus column.
    """
    vocabulary = {token: index for index, token in enumerate({*reference, *hypothesis})}
    columns = np.arange(len(hypothesis) + 1)
    hypothesis_ids = np.array([vocabulary[token] for token in hypothesis], dtype=np.int64)
    cost = np.empty((len(reference) + 1, len(hypothesis) + 1), dtype=np.int64)
    cost[0] = columns
    for row, token in enumerate(reference, start=1):
        deleted = cost[row - 1] + 1
        diagonal = cost[row - 1, :-1] + (hypothesis_ids != vocabulary[token])
        cheapest = np.concatenate([deleted[:1], np.minimum(deleted[1:], diagonal)])
        cost[row] = np.minimum.accumulate(cheapest - columns) + columns

    substitutions = deletions = insertions = 0
    row, column = len(reference), len(hypothesis)
    while row or column:
        if row and cost[row, column] == cost[row - 1, column] + 1:
            deletions, row = deletions + 1, row - 1
        elif column and cost[row, column] == cost[row, column - 1] + 1:
            insertions, column = insertions + 1, column - 1
        else:
            row, column = row - 1, column - 1
            substitutions += reference[row] != hypothesis[column]
    return ErrorCounts(substitutions, deletions, insertions, len(reference))


_WORD_BREAKS = " \t\r\n"
_LEADING_PUNCTUATION = frozenset("!,?、。！，；？：「」︰『』《》")
_TAG = re.compile(r"<[^>]*(>|$)")
_CHINESE_PUNCTUATION = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙"
    "〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
_SEED_TTS_PUNCTUATION: dict[int, str | None] = {
    ord(mark): None for mark in _CHINESE_PUNCTUATION + string.punctuation if mark != "'"
}
_SEED_TTS_PUNCTUATION |= {ord(blank): " " for blank in "\t\r\n"}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _split_words(text: str) -> list[str]:
    """One token per caseless letter (Unicode Lo); others take the ASCII that follows them."""
    tokens, start = [], 0
    while start < len(text):
        first = text[start]
        if (
            first in _LEADING_PUNCTUATION
            or first in _WORD_BREAKS
            or unicodedata.category(first) in ("Zs", "Cn")
        ):
            start += 1
            continue
        end = start + 1
        if unicodedata.category(first) != "Lo":
            while end < len(text) and text[end].isascii() and text[end] not in _WORD_BREAKS:
                end += 1
                if first == "<" and text[end - 1] == ">":
                    break
        tokens.append(text[start:end])
        start = end
    return tokens


def _normalise_tokens(tokens: Sequence[str], case_sensitive: bool) -> list[str]:
    cased = (token if case_sensitive else token.upper() for token in tokens)
    return [bare for bare in (_TAG.sub("", token) for token in cased) if bare]
