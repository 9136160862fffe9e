"""Texts of corpora: normalisation, by name, and the checks that need no audio."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

LANGUAGES = ("en", "zh")
"""Languages that the check can tell apart, by their script."""

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_FOREIGN_SHARE = {"en": 0.1, "zh": 0.7}
"""The most letters of another script: names in Chinese texts are often written in Latin letters."""
_BETWEEN_HAN = re.compile(r"(?<=[\u3400-\u9fff，。！？、；：])\s+(?=[\u3400-\u9fff，。！？、；：])")
_GIGASPEECH_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_MARKS = re.compile(r"<[^<>|]{1,20}>|\[[^\[\]]{1,20}\]")


def normalise(text: str, names: Sequence[str]) -> str:
    """A text after some of :data:`NORMALISERS`, in Unicode's composed form and with single spaces."""
    for name in names:
        text = NORMALISERS[name](text)
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFC", text)).strip()


def characters(text: str) -> int:
    """Letters and digits of a text: the length that is spoken."""
    return sum(unicodedata.category(character)[0] in "LN" for character in text)


def is_doubled(text: str) -> bool:
    """Whether a text of four or more words (Chinese: eight characters) is one phrase, written twice."""
    words = text.split()
    if len(words) == 1:
        words = list(text) if len(text) >= 8 and _HAN.search(text) else []
    half = len(words) // 2
    return len(words) >= 4 and len(words) % 2 == 0 and words[:half] == words[half:]


def is_of(text: str, languages: Sequence[str]) -> bool:
    """Whether the letters of a text are of the script of one of these languages."""
    letters = [character for character in text if character.isalpha()]
    if not letters or not languages:
        return True
    han = sum(bool(_HAN.match(letter)) for letter in letters) / len(letters)
    latin = sum("LATIN" in unicodedata.name(letter, "") for letter in letters) / len(letters)
    share = {"zh": han, "en": latin}
    return any(1 - share[language] <= _FOREIGN_SHARE[language] for language in languages)


def _simplified(text: str) -> str:
    from vita_audio.extras import needs_extra

    with needs_extra("corpora"):
        import zhconv
    simplified: str = zhconv.convert(text, "zh-cn")
    return simplified


def _gigaspeech(text: str) -> str:
    """Punctuation marks of GigaSpeech as punctuation."""
    for mark, sign in _GIGASPEECH_MARKS.items():
        text = re.sub(rf"\s*{mark}", sign, text)
    return text


def _sentence(text: str) -> str:
    """A text in capitals in lower case, but for the first letter of a sentence and the word I."""
    if text != text.upper():
        return text
    text = re.sub(r"\bi\b", "I", text.lower())
    return re.sub(r"(^|[.?!]\s+)(\w)", lambda match: match[1] + match[2].upper(), text)


NORMALISERS: dict[str, Callable[[str], str]] = {
    "gigaspeech": _gigaspeech,
    "lower": str.lower,
    "marks": lambda text: _MARKS.sub(" ", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "no_spaces": lambda text: _BETWEEN_HAN.sub("", text),
    "sentence": _sentence,
    "simplified": _simplified,
}
"""``marks`` removes ``<sil>`` and ``[noise]``; ``no_spaces`` those between Chinese characters; ``nfkc`` makes
full-width letters and digits half-width; ``simplified`` converts traditional characters."""
