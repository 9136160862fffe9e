"""Checks whether a reply contains the answer, by the published rule and by a strict one.

The published rule (section 8.2 of the data specification) matches parts of words: "eight" is in "eighteen", and
an answer of only punctuation is in every reply. The strict rule compares whole words, and numbers by value.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterator, Sequence

from word2number import w2n

from vita_audio.evaluation.normalisers import nfc
from vita_audio.evaluation.numerals import CHINESE_NUMERALS, with_digits


def contains_answer(prediction: str, answer: str | Sequence[str], *, whole_words: bool = False) -> bool:
    """Whether a free-form reply contains the answer, or one of several answers.

    The published rule: each space-separated part of the answer is a substring of the prediction; failing that,
    the answer's number words are tried as digits.

    Args:
        prediction: the model's reply.
        answer: an answer, or alternatives of which one suffices.
        whole_words: use the strict rule: the answer's words occur consecutively in the prediction, as
            whole words, and numbers match in any spelling. Scripts without spaces between words, such as
            Chinese, are compared character by character. An answer without words never matches.

    Raises:
        TypeError: prediction or an answer is not a string.
    """
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(prediction, str):
        raise TypeError(f"the prediction must be a string, not {type(prediction).__name__}")
    if not isinstance(answers, Sequence) or not all(isinstance(item, str) for item in answers):
        raise TypeError(f"an answer is a string or a list of strings, not {answer!r}")
    prediction, answers = nfc(prediction), [nfc(item) for item in answers]
    if whole_words:
        words = answer_words(prediction)
        return any(_has_phrase(words, answer_words(item)) for item in answers)
    prediction = prediction.lower()
    cleaned = [item.translate(_PUNCTUATION).lower().strip() for item in answers]
    if any(_has_all_parts(prediction, item) for item in cleaned):
        return True
    numbers = [_number(item) for item in cleaned]
    if None in numbers:  # a part that is not a number disables the second attempt (section 8.2)
        return False
    return any(_has_all_parts(prediction, str(number)) for number in numbers)


def answer_words(text: str) -> list[str]:
    """The tokens of the strict rule: lower-case words without punctuation, numbers as digits.

    "One hundred and twenty", "120" and "一百二十" are all ``["120"]``; "北京" is two words. "Twenty-first" is "21st"
    and holds neither "20" nor "21"; "-5" is "minus five"; "50%" is "fifty percent". Invisible
    characters, such as zero-width spaces, and vowel marks of Arabic and Hebrew are ignored.
    """
    text = nfc(text.translate(_HALF_WIDTH)).casefold().replace("’", "'").replace("i\u0307", "i")
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    text = _PERCENT.sub(r"\1 percent", _VOWEL_MARKS.sub("", text))
    return with_digits(_words(_INITIALS.sub(lambda initials: initials[0].replace(".", ""), text)))


_PUNCTUATION = str.maketrans({mark: " " for mark in string.punctuation if mark not in "'\\"})
_NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d+)?|(?<![\w.])\.\d+")
_ORDINAL_SUFFIX = re.compile(r"(?:st|nd|rd|th)(?!\w)")
_SIGN = re.compile(r"(?<!\w)[-−](?=\.?\d)")
_PERCENT = re.compile(r"([\d\w])\s?(?:%|per cent\b)")
_INITIALS = re.compile(r"(?<!\w)(?:[^\W\d_]\.){2,}")
_VOWEL_MARKS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670]")
_HALF_WIDTH = {0xFF01 + place: chr(0x21 + place) for place in range(94)}
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai and Lao, Tibetan, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\uac00-\ud7af"  # kana; Hangul, whose particles follow without a space
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # ideographs
)


def _words(text: str) -> Iterator[str]:
    """Numbers, words of letters with inner apostrophes, and single characters of scripts without spaces; but
    adjacent Chinese numerals form one word."""
    start = 0
    while start < len(text):
        number = _NUMBER.match(text, start)
        if number:
            start = number.end()
            ordinal = _ORDINAL_SUFFIX.match(text, start)
            start = ordinal.end() if ordinal else start
            digits = number[0].replace(",", "")
            yield ("0" if digits[0] == "." else "") + digits + ("th" if ordinal else "")
        elif _SIGN.match(text, start):
            yield "minus"
            start += 1
        elif not _is_letter(text[start]):
            start += 1
        else:
            end = _word_end(text, start)
            yield text[start:end]
            start = end


def _word_end(text: str, start: int) -> int:
    end = start + 1
    if text[start] in CHINESE_NUMERALS:
        while end < len(text) and text[end] in CHINESE_NUMERALS:
            end += 1
        return end
    unspaced = bool(_UNSPACED.match(text[start]))
    while end < len(text):
        letter = text[end]
        if unspaced:
            joined = unicodedata.category(letter).startswith("M")
        elif letter == "'":
            joined = end + 1 < len(text) and _is_letter(text[end + 1])
        else:
            joined = _is_letter(letter) and not _UNSPACED.match(letter)
        if not joined:
            break
        end += 1
    return end


def _is_letter(character: str) -> bool:
    """Whether a character is a letter or a mark that belongs to one."""
    return unicodedata.category(character)[0] in "LM" or character == "〇"


def _has_phrase(words: Sequence[str], phrase: Sequence[str]) -> bool:
    width = len(phrase)
    return width > 0 and any(
        list(words[start : start + width]) == list(phrase) for start in range(len(words) - width + 1)
    )


def _has_all_parts(prediction: str, answer: str) -> bool:
    return all(part in prediction for part in answer.split(" "))


def _number(text: str) -> int | float | None:
    """Value of English number words; None if there are none or they form no number."""
    try:
        value: int | float = w2n.word_to_num(text)
    except (ValueError, IndexError):  # word2number raises IndexError for "thousand zero"
        return None
    return value
