"""Texts of corpora: the checks that need no audio."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

LANGUAGES = ("en", "zh")
"""Languages that the check can tell apart, by their script."""

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_FOREIGN_SHARE = {"en": 0.1, "zh": 0.7}
"""The most letters of another script: names in Chinese texts are often written in Latin letters."""


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
