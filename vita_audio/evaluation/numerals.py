"""Numbers written in words, English and Chinese, as digits: cardinals, ordinals, decimals, and their signs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation


def with_digits(words: Iterable[str]) -> list[str]:
    """The same words with every number as digits: "twenty", "one" become "21"; "three", "five" stay two numbers.

    Ordinals become "21th", negative numbers "-5".

    Args:
        words: lower-case; adjacent Chinese numerals form one word.
    """
    words = list(words)
    result: list[str] = []
    start = 0
    while start < len(words):
        for read in _READERS:
            number, end = read(words, start)
            if end > start:
                result.append(number)
                start = end
                break
        else:
            result.append(words[start])
            start += 1
    return result


_UNITS = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value
    for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2)
}
_ORDINALS = {
    **{f"{word}th": word for word in ("four", "six", "seven", "ten", "eleven", *list(_UNITS)[13:])},
    **{word.removesuffix("y") + "ieth": word for word in _TENS},
    "first": "one",
    "second": "two",
    "third": "three",
    "fifth": "five",
    "eighth": "eight",
    "ninth": "nine",
    "twelfth": "twelve",
    **{f"{word}th": word for word in ("hundred", "thousand", "million", "billion", "trillion")},
}
_SIGNS = frozenset({"minus", "negative", "负", "負"})
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NUMBER_WORDS = frozenset({"a", "and", "hundred", *_UNITS, *_TENS, *_SCALES})
_LONGEST_ORDINAL = 24
"""Words of a number up to the trillions."""

_CHINESE_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
    "兩": 2,
}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}
_CHINESE_GROUPS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_CHINESE_POINTS = frozenset({"点", "點"})
CHINESE_NUMERALS = frozenset({**_CHINESE_DIGITS, **_CHINESE_SCALES, **_CHINESE_GROUPS})


def _read_signed(words: Sequence[str], start: int) -> tuple[str, int]:
    """A number behind its sign. Between two numbers, "minus" is a sum."""
    if words[start] not in _SIGNS or start + 1 == len(words) or _ends_number(words, start):
        return "", start
    for read in (_read_english, _read_digits, _read_chinese):
        number, end = read(words, start + 1)
        if end > start + 1:
            return (number if number == "0" else f"-{number}"), end
    return "", start


def _ends_number(words: Sequence[str], end: int) -> bool:
    """Whether the word before ``end`` is a number or the end of one."""
    word = words[end - 1] if end else ""
    return (
        word[:1].isdigit()
        or word in _NUMBER_WORDS - {"a", "and"}
        or (word != "" and CHINESE_NUMERALS.issuperset(word))
    )


def _read_ordinal(words: Sequence[str], start: int) -> tuple[str, int]:
    """An ordinal in words: "twenty", "first" is "21th", as is "21st"."""
    end = start
    while _at(words, end) not in _ORDINALS:
        if end - start == _LONGEST_ORDINAL or _at(words, end) not in _NUMBER_WORDS:
            return "", start
        end += 1
    cardinal = [*words[start:end], _ORDINALS[words[end]]]
    number, length = _read_english(cardinal, 0)
    return (f"{number}th", end + 1) if length == len(cardinal) else ("", start)


def _read_digits(words: Sequence[str], start: int) -> tuple[str, int]:
    """A number in digits, in canonical form: 3.50 is 3.5, 007 is 7."""
    if not words[start][0].isdigit():
        return "", start
    try:
        value = Decimal(words[start])
    except InvalidOperation:  # digits such as ² that are not decimal
        return "", start
    return _plain(value), start + 1


def _read_english(words: Sequence[str], start: int) -> tuple[str, int]:
    """The longest English number: groups of decreasing scale, "and" before the last, "point" and digits."""
    place = start + (words[start] == "a" and _at(words, start + 1) in {"hundred", *_SCALES})
    total: int | Decimal = 0
    found = False
    for name, scale in reversed(_SCALES.items()):
        group, after = _read_group(words, place)
        bare = after == place  # a scale without a number before it starts a number and does not continue one
        if _at(words, after) == name and not (bare and found):
            total += (1 if bare else group) * scale
            place, found = after + 1, True
    last = place + (found and _at(words, place) == "and")
    group, after = _read_group(words, last)
    if after > last and _at(words, after) not in _SCALES:
        total, place, found = total + group, after, True
    if not found:
        return "", start
    decimals, end = "", place + 1
    while _at(words, place) == "point" and _at(words, end) in _DIGIT_WORDS:
        decimals += str(_UNITS[words[end]])
        end += 1
    return _plain(total + Decimal(f"0.{decimals or 0}")), end if decimals else place


_DIGIT_WORDS = frozenset(word for word, value in _UNITS.items() if value < 10)


def _read_group(words: Sequence[str], start: int) -> tuple[int | Decimal, int]:
    """A number below a thousand, such as "two hundred and one", or digits before a scale, and where it ends."""
    if _at(words, start)[:1].isdigit() and _at(words, start + 1) in _SCALES:
        digits, place = _read_digits(words, start)
        return (Decimal(digits), place) if digits else (0, start)
    value, place = _read_below_hundred(words, start)
    if _at(words, place) != "hundred" or (place > start and value == 0):
        return value, place
    value, place = 100 * (value if place > start else 1), place + 1
    last = place + (_at(words, place) == "and")
    rest, after = _read_below_hundred(words, last)
    if after > last and _at(words, after) != "hundred":
        return value + rest, after
    return value, place


def _read_below_hundred(words: Sequence[str], start: int) -> tuple[int, int]:
    word, following = _at(words, start), _at(words, start + 1)
    if word in _UNITS:
        return _UNITS[word], start + 1
    if word in _TENS:
        unit = _UNITS.get(following, 0)
        return (_TENS[word] + unit, start + 2) if 1 <= unit <= 9 else (_TENS[word], start + 1)
    return 0, start


def _read_chinese(words: Sequence[str], start: int) -> tuple[str, int]:
    """Chinese numerals: 一百二十 by value, 一九九九 digit by digit."""
    numerals = words[start]
    if not CHINESE_NUMERALS.issuperset(numerals):
        return "", start
    decimals = _at(words, start + 2)
    if _at(words, start + 1) in _CHINESE_POINTS and decimals and set(decimals) <= _CHINESE_DIGITS.keys():
        whole = _chinese_value(numerals)
        return _plain(Decimal(f"{whole}.{_chinese_digits(decimals)}")), start + 3
    return _plain(Decimal(_chinese_value(numerals))), start + 1


def _chinese_digits(numerals: str) -> str:
    return "".join(str(_CHINESE_DIGITS[numeral]) for numeral in numerals)


def _chinese_value(numerals: str) -> int:
    if all(numeral in _CHINESE_DIGITS for numeral in numerals):
        return int(_chinese_digits(numerals))
    total = section = 0
    digit: int | None = None
    for numeral in numerals:
        if numeral in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[numeral]
        elif numeral in _CHINESE_SCALES:
            section += (1 if digit is None else digit or 1) * _CHINESE_SCALES[numeral]
            digit = None
        else:
            total = (total + section + (digit or 0) or 1) * _CHINESE_GROUPS[numeral]
            section, digit = 0, None
    scale = {**_CHINESE_SCALES, **_CHINESE_GROUPS}.get(numerals[-2:-1], 10)
    if digit and scale > 10:  # 一百二 is 120, 一百零二 is 102
        digit *= scale // 10
    return total + section + (digit or 0)


_READERS: tuple[Callable[[Sequence[str], int], tuple[str, int]], ...] = (
    _read_signed,
    _read_ordinal,
    _read_english,  # before digits: 1.5 million
    _read_digits,
    _read_chinese,
)


def _plain(value: Decimal) -> str:
    """Strip leading and trailing zeros that do not change the value."""
    text = format(value.normalize(), "f")
    return "0" if text == "-0" else text


def _at(words: Sequence[str], place: int) -> str:
    return words[place] if place < len(words) else ""
