"""Interleaves the text and speech of one reply.

A reply is learnt as a short run of text, the speech codes for roughly that text, more text, more speech. The
ratio ``[t1, a1, t2, a2, ...]`` gives the lengths of the runs, the last one repeating; the two markers of
a speech run are included in a. Section 3 of the data specification (tests/goldens/data/SPEC.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat

from vita_audio.chat.sample import Reason, SampleError
from vita_audio.constants import DEFAULT_TEXT_AUDIO_RATIO

MARKERS_PER_SPAN = 2
"""``<|begin_of_audio|>`` and ``<|end_of_audio|>``, counted in the ratio's audio entries."""


class SpanError(SampleError, AssertionError):
    """A reply whose speech markers do not pair up.

    Also an ``AssertionError``, the type that the specification requires.
    """

    def __init__(self, message: str):
        super().__init__(Reason.BAD_SPANS, message)


def interleave_text_audio(
    ids: Sequence[int], begin_id: int, end_id: int, ratio: Sequence[int] | None = None
) -> list[int]:
    """Interleave the text and the one speech span of a reply.

    Text after the span moves in front of it. Speech left over when the text ends goes into one
    long final span; text left over when the speech ends is placed before the final span.

    Args:
        ids: token ids of the reply.
        begin_id: id of ``<|begin_of_audio|>``.
        end_id: id of ``<|end_of_audio|>``.
        ratio: run lengths; None: ``[1, 10, 4, 10]``.

    Returns:
        The same text and speech ids in their order, with markers around each speech run. Replies
        with only text or only speech are returned unchanged, as are replies with an empty span.

    Raises:
        SpanError: more than one span, or markers that do not pair up.
        ValueError: a ratio that uses up no tokens (see :func:`check_ratio`).
    """
    ids = list(ids)
    text_sizes, audio_sizes = check_ratio(ratio)
    begins, ends = ids.count(begin_id), ids.count(end_id)
    if begins == ends == 0:
        return ids
    if begins != 1 or ends != 1:
        raise SpanError(f"a reply may hold one speech span, this has {begins} begins and {ends} ends")
    begin, end = ids.index(begin_id), ids.index(end_id)
    if begin > end:
        raise SpanError("the speech span of a reply ends before it begins")
    text, audio = ids[:begin] + ids[end + 1 :], ids[begin + 1 : end]
    if not text:
        return ids
    if not audio:
        return [*text, begin_id, end_id]

    text_chunks, audio_chunks = _chunks(text, text_sizes), _chunks(audio, audio_sizes)
    rounds = min(len(text_chunks), len(audio_chunks))
    interleaved: list[int] = []
    for text_chunk, audio_chunk in zip(
        _merge_tail(text_chunks, rounds), _merge_tail(audio_chunks, rounds), strict=True
    ):
        interleaved += [*text_chunk, begin_id, *audio_chunk, end_id]
    return interleaved


def check_ratio(ratio: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Split a ratio into text run lengths and speech run lengths (without markers).

    Raises:
        ValueError: fewer than two entries, a text entry below 1 or an audio entry below 3: such a
            run holds no token, so interleaving would never finish.
    """
    entries = list(DEFAULT_TEXT_AUDIO_RATIO if ratio is None else ratio)
    if len(entries) < 2 or not all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"text-audio ratio {entries}: give whole numbers 'text audio', such as 1 10 4 10")
    text_sizes = entries[0::2]
    audio_sizes = [size - MARKERS_PER_SPAN for size in entries[1::2]]
    if min(text_sizes) < 1 or min(audio_sizes) < 1:
        raise ValueError(
            f"text-audio ratio {entries}: text entries must be at least 1, audio entries at least "
            f"{MARKERS_PER_SPAN + 1} (two of them are the markers)"
        )
    return text_sizes, audio_sizes


def _chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    chunks: list[list[int]] = []
    start = 0
    for size in chain(sizes, repeat(sizes[-1])):
        if start >= len(ids):
            return chunks
        chunks.append(ids[start : start + size])
        start += size
    return chunks


def _merge_tail(chunks: list[list[int]], count: int) -> list[list[int]]:
    """The first ``count`` chunks; the last of them also holds everything that follows."""
    return [*chunks[: count - 1], list(chain.from_iterable(chunks[count - 1 :]))]
