"""Texts of corpora as a model should write them: normalisers by name, for recipes and ``--normalise``."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

from vita_audio.extras import needs_extra

_GIGASPEECH_MARKS = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_MARKS = re.compile(r"<[^<>|]{1,20}>|\[[^\[\]]{1,20}\]")
_HAN = "\u3400-\u9fff"
_BETWEEN_HAN = re.compile(rf"(?<=[{_HAN}，。！？、；：])\s+(?=[{_HAN}，。！？、；：])")
_HALF_WIDTH, _FULL_WIDTH = ",.!?;:()", "，。！？；：（）"
_TO_FULL_WIDTH = str.maketrans(_HALF_WIDTH, _FULL_WIDTH)
_TO_ASCII = str.maketrans(_FULL_WIDTH + "“”‘’、", _HALF_WIDTH + "\"\"'',")
_ENGLISH_NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>[-−])?(?P<dollars>\$)?(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
    r"(?P<decimals>\.[0-9]+)?(?P<ordinal>st|nd|rd|th)?(?P<percent> ?%)?(?![\w])(?![.,][0-9])"
)
_CHINESE_DATE = re.compile(r"(?<![0-9])([0-9]{4})[-/]([0-9]{1,2})[-/]([0-9]{1,2})(?![0-9])")
_SPELLED_OUT = 9
"""Digits from which a number, such as one of a telephone, is read digit by digit."""


def normalise(text: str, names: Sequence[str]) -> str:
    """A text after some of :data:`NORMALISERS`, composed (NFC), with single spaces and no control characters.

    Raises:
        ModuleNotFoundError: a normaliser needs a library that is not installed.
    """
    for name in names:
        text = NORMALISERS[name](text)
    text = _CONTROL.sub("", text)
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFC", text)).strip()


def _simplified(text: str) -> str:
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


def _punctuation(text: str) -> str:
    """Chinese text with full-width marks, other text with ASCII marks; repeated marks once."""
    text = re.sub(r"\.{2,}|。{2,}|…+", "…", text)
    text = re.sub(r"([,!?;:，！？；：、])\1+", r"\1", text)
    if re.search(f"[{_HAN}]", text) is None:
        return text.translate(_TO_ASCII)
    marks = re.escape(_HALF_WIDTH)
    beside_han = rf"(?<=[{_HAN}{_FULL_WIDTH}”])\s*[{marks}]+(?![0-9])|[{marks}](?=[{_HAN}])"
    return re.sub(beside_han, lambda match: match[0].strip().translate(_TO_FULL_WIDTH), text)


def _english_numbers(text: str) -> str:
    """Numbers as words; those that are a part of a word stay."""
    return _ENGLISH_NUMBER.sub(_english_number, text)


def _english_number(match: re.Match[str]) -> str:
    with needs_extra("corpora"):
        from num2words import num2words
    digits, decimals = match["digits"].replace(",", ""), match["decimals"] or ""
    if len(digits) >= _SPELLED_OUT or (len(digits) > 1 and digits[0] == "0"):
        words = " ".join(num2words(int(digit)) for digit in digits)
    elif match["ordinal"]:
        words = num2words(int(digits), to="ordinal")
    elif len(digits) == 4 and 1100 <= int(digits) < 2100 and digits == match["digits"] and not decimals:
        words = num2words(int(digits), to="year")
    else:
        words = num2words(int(digits))
    cents = f"{decimals[1:]:0<2}" if match["dollars"] and len(decimals) in (2, 3) else ""
    if decimals and not cents:
        words += " point " + " ".join(num2words(int(digit)) for digit in decimals[1:])
    if match["dollars"]:
        words += " dollar" if digits == "1" and not decimals else " dollars"
        words += f" and {num2words(int(cents))} cents" if cents and int(cents) else ""
    return (
        f"{'minus ' if match['sign'] else ''}{words.replace(',', '')}{' percent' if match['percent'] else ''}"
    )


def _chinese_numbers(text: str) -> str:
    """Numbers, dates, fractions, percentages and temperatures as they are read."""
    with needs_extra("corpora"):
        import cn2an
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text.replace("℃", "摄氏度"))
    text = _CHINESE_DATE.sub(lambda match: f"{match[1]}年{int(match[2])}月{int(match[3])}日", text)
    text = re.sub(r"(?<=[0-9])[-~](?=[0-9])", "到", text)
    text = re.sub(
        rf"(?<![0-9.])(?:0[0-9]+|[0-9]{{{_SPELLED_OUT},}})(?![0-9.])",
        lambda match: match[0].translate(str.maketrans("0123456789", "零一二三四五六七八九")),
        text,
    )
    read: str = cn2an.transform(text, "an2cn")
    return read


NORMALISERS: dict[str, Callable[[str], str]] = {
    "gigaspeech": _gigaspeech,
    "lower": str.lower,
    "marks": lambda text: _MARKS.sub(" ", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "no_spaces": lambda text: _BETWEEN_HAN.sub("", text),
    "numbers_en": _english_numbers,
    "numbers_zh": _chinese_numbers,
    "punctuation": _punctuation,
    "sentence": _sentence,
    "simplified": _simplified,
}
"""``marks`` removes ``<sil>`` and ``[noise]``; ``no_spaces`` removes spaces between Chinese characters; ``nfkc`` makes
full-width letters, digits and marks half-width; ``simplified`` converts traditional characters; ``numbers_en`` and
``numbers_zh`` write digits as words."""
