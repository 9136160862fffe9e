"""Text normalisation before words are compared."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

Normaliser = Callable[[str], str]


def normaliser(name: str) -> Normaliser:
    """A normaliser by its name in :data:`NORMALISERS`.

    Raises:
        ValueError: there is no normaliser of this name, or its package is not installed.
    """
    if name not in NORMALISERS:
        raise ValueError(f"unknown text normaliser {name!r}; known: {', '.join(NORMALISERS)}")
    if name == "libritts":
        _text_normaliser()
    elif name.startswith("whisper"):
        _whisper_normaliser(name)
    return NORMALISERS[name]


def nfc(text: str) -> str:
    """Letters and their accents as single characters, if Unicode has them."""
    return unicodedata.normalize("NFC", text)


def plain_words(text: str) -> str:
    """Every run of characters that are neither letters nor digits becomes one space (section 8.1, LibriTTS)."""
    return re.sub(r"\W+", " ", nfc(text)).strip()


def libritts_words(text: str) -> str:
    """As published for LibriTTS: numbers and abbreviations as WeTextProcessing spells them, then plain words.

    Raises:
        ValueError: WeTextProcessing is not installed.
    """
    return plain_words(_text_normaliser().normalize(nfc(text)))


def whisper_english(text: str) -> str:
    """As published Whisper figures compare English: spelling, numbers and contractions made alike.

    Raises:
        ValueError: whisper-normalizer is not installed.
    """
    return str(_whisper_normaliser("whisper")(nfc(text))).strip()


def whisper_basic(text: str) -> str:
    """As published Whisper figures compare other languages: lower case, without marks and bracketed remarks.

    Raises:
        ValueError: whisper-normalizer is not installed.
    """
    return str(_whisper_normaliser("whisper-basic")(nfc(text))).strip()


@cache
def _whisper_normaliser(name: str) -> Any:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise ValueError(
            f"the {name} normaliser needs whisper-normalizer; pip install -e '.[eval]'"
        ) from error
    return EnglishTextNormalizer() if name == "whisper" else BasicTextNormalizer()


@cache
def _text_normaliser() -> Any:
    try:
        package = import_module("tn.english.normalizer")
    except ImportError as error:
        raise ValueError(
            "the libritts normaliser needs WeTextProcessing; pip install -e '.[libritts]'"
        ) from error
    logging.getLogger("wetext").setLevel(logging.WARNING)  # it logs the path of its grammar
    return package.Normalizer()


NORMALISERS: dict[str, Normaliser] = {
    "words": plain_words,
    "libritts": libritts_words,
    "whisper": whisper_english,
    "whisper-basic": whisper_basic,
}
