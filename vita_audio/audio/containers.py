"""The actual content of an audio file, regardless of its header.

Recorders that are killed or write into a pipe leave a length of 0, of 2 GB or of all ones; files are joined
with ``cat``; headers become outdated. libsndfile trusts them, so speech is silently lost. Here the samples of the
common formats are located in the file itself. Each recording becomes a :class:`Part` with the header fields
that must change for libsndfile to read all of it. A file shorter than a plausible stated length is refused.

Covered: WAV, RF64, W64, AIFF, 8SVX, CAF, AU, NIST SPHERE and FLAC by their lengths, Ogg by its links, MP3 by its frames
(:mod:`vita_audio.audio.mp3`). Other formats are passed through unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from vita_audio.audio import mp3
from vita_audio.audio.base import AudioError

_TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICS")
_CHUNKS_BEHIND = (b"LIST", b"id3 ", b"bext", b"iXML", b"_PMX")  # known even if they are cut off
_PADDING_BYTES = 4096  # up to this many zeros after the samples are padding, not silence


@dataclass(frozen=True)
class Part:
    """One recording inside a file.

    Attributes:
        start, end: byte range in the file.
        edits: (offset in the file, new bytes) of header fields that are wrong.
        prefix: bytes to put before it.
    """

    start: int
    end: int
    edits: tuple[tuple[int, bytes], ...] = ()
    prefix: bytes = b""

    def read(self, file: BinaryIO) -> bytes:
        """The recording as a file with its true length in the header."""
        content = bytearray(_read(file, self.start, self.end - self.start))
        for offset, new in self.edits:
            content[offset - self.start : offset - self.start + len(new)] = new
        return self.prefix + bytes(content)


def find_parts(file: BinaryIO, name: str) -> list[Part]:
    """The recordings in a file, in order.

    Args:
        file: an open audio file.
        name: for messages.

    Returns:
        ``[Part(0, size)]``, without edits, if libsndfile can read the file unchanged.

    Raises:
        AudioError: the file is shorter than its header states.
    """
    end = file.seek(0, 2)
    start = _after_id3(file)
    head = _read(file, start, 48)
    if head[:4] == b"fLaC":
        return _flac_parts(file, start, end, name)
    if head[:4] == b"OggS":
        return _ogg_parts(file, start, end)
    if mp3.is_frame(head):
        found = mp3.find_parts(file, start, end, name)
        if found:
            return [Part(*fields) for fields in found]
    elif head[:7] == b"NIST_1A":
        _check_sphere(file, start, end, name)
    elif _layout(head) is not None:
        return list(_sized_parts(file, start, end, name))
    return [Part(0, end)]


# --- formats whose header states the bytes of the samples -------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The chunk layout of a format.

    Attributes:
        first: offset of the first chunk.
        name_bytes, size_bytes: of a chunk's header.
        order: byte order of numbers.
        align: chunks start at multiples of this.
        own_header: whether a size counts the chunk's header.
        data: name of the chunk of samples.
        lead: bytes before the samples that its size includes.
        form: (offset, width) of the size of the whole file, if a wrong one breaks libsndfile.
    """

    first: int
    name_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    align: int
    data: bytes
    own_header: bool = False
    lead: int = 0
    form: tuple[int, int] | None = None

    @property
    def header(self) -> int:
        return self.name_bytes + self.size_bytes


_W64_GUID = bytes.fromhex("2e91cf11a5d628db04c10000")
_WAV = _Layout(12, 4, 4, "little", 2, b"data")
_LAYOUTS = {
    (b"RIFF", b"WAVE"): _WAV,
    (b"RF64", b"WAVE"): _WAV,
    (b"BW64", b"WAVE"): _WAV,
    (b"RIFX", b"WAVE"): _Layout(12, 4, 4, "big", 2, b"data"),
    (b"FORM", b"AIFF"): _Layout(12, 4, 4, "big", 2, b"SSND", lead=8),
    (b"FORM", b"8SVX"): _Layout(12, 4, 4, "big", 2, b"BODY"),
    (b"FORM", b"16SV"): _Layout(12, 4, 4, "big", 2, b"BODY"),
    (b"FORM", b"AIFC"): _Layout(12, 4, 4, "big", 2, b"SSND", lead=8),
}
_W64 = _Layout(40, 16, 8, "little", 8, b"data", own_header=True, form=(16, 8))
_CAF = _Layout(8, 4, 8, "big", 1, b"data", lead=4)
_CAF_START = b"caff\x00\x01\x00\x00desc" + (32).to_bytes(8, "big")
_AU = _Layout(4, 4, 4, "big", 1, b".snd")  # no chunks: offset and size of the samples


def _layout(head: bytes) -> _Layout | None:
    if head[:4] == b".snd":
        return _AU
    if head[:4] == b"caff":
        return _CAF
    if head[:4] == b"riff" and head[4:16] == _W64_GUID:
        return _W64
    return _LAYOUTS.get((head[:4], head[8:12]))


def _sized_parts(file: BinaryIO, start: int, end: int, name: str) -> Iterator[Part]:
    """The recording at ``start``, and those appended to it."""
    while (layout := _layout(_read(file, start, 48))) is not None:
        field = _au_field(file, start) if layout is _AU else _size_field(file, start, end, layout)
        if field is None:  # no samples; libsndfile reports the error
            break
        offset, width, begin = field
        added = layout.header if layout.own_header else 0
        declared = int.from_bytes(_read(file, offset, width), layout.order) - added
        length, stop = _true_length(file, begin, declared, end, layout, name)
        edits: list[tuple[int, bytes]] = []
        if length != declared:
            most = (1 << 8 * width) - 1
            edits.append((offset, min(length + added, most).to_bytes(width, layout.order)))
            form = layout.form or ((offset - start - 8, 8) if width > layout.size_bytes else None)
            if form is not None:
                edits.append((start + form[0], (stop - start).to_bytes(form[1], layout.order)))
        if length > layout.lead or stop >= end:  # pipes can leave headers without samples at the start
            yield Part(start, stop, tuple(edits))
        start = stop
        if stop >= end:
            return
    yield Part(start, end)


def _au_field(file: BinaryIO, start: int) -> tuple[int, int, int] | None:
    """(offset of the size, its bytes, start of the samples); None for a damaged header."""
    header = int.from_bytes(_read(file, start + 4, 4), "big")
    return (start + 8, 4, start + header) if header >= 24 else None


def _size_field(file: BinaryIO, start: int, end: int, layout: _Layout) -> tuple[int, int, int] | None:
    """As :func:`_au_field`, for the chunk of samples; RF64 keeps the size in its first chunk, ``ds64``."""
    at, wide = start + layout.first, None
    while at + layout.header <= end:
        chunk, size = _chunk(file, at, layout)
        begin = at + layout.header
        if chunk == layout.data:
            if wide is not None and size == 0xFFFFFFFF:
                return wide, 8, begin
            return at + layout.name_bytes, layout.size_bytes, begin
        if chunk == b"ds64":
            wide = begin + 8
        at = _aligned(begin + max(0, size), start, layout)
    return None


def _true_length(
    file: BinaryIO, begin: int, declared: int, end: int, layout: _Layout, name: str
) -> tuple[int, int]:
    """The actual size of the chunk of samples in bytes, and the end of the recording."""
    room = end - begin
    written = declared + (layout.header if layout.own_header else 0)
    if declared > room and not _is_placeholder(written):
        raise AudioError(f"{name}: cut off, {room} of {declared} bytes are there", "truncated")
    stated = max(declared, layout.lead)
    stop = _end_of_tail(file, begin + stated, end, layout) if stated <= room else None
    if stop is not None:
        return stated, stop
    if layout is _CAF:  # its packets may be compressed, so an appended file would not be decoded as samples
        end = next(_find_all(file, _CAF_START, begin, end), end)
    return end - begin, end


def _is_placeholder(length: int) -> bool:
    """Whether recorders write this value for an unknown length: about 2 GB, 4 GB, or impossibly large."""
    return 0x7F000000 <= length <= 0x80000000 or 0xFF000000 <= length <= 1 << 32 or length >= 1 << 40


def _end_of_tail(file: BinaryIO, at: int, end: int, layout: _Layout) -> int | None:
    """The end of the recording whose samples end at ``at``; None if samples seem to continue there."""
    rest = _read(file, at, _PADDING_BYTES + 1)
    if rest.startswith(_TAGS) or (len(rest) <= _PADDING_BYTES and not any(rest)):
        return end
    for start in dict.fromkeys((_aligned(at, 0, layout), at)):  # some writers omit the padding
        stop = _end_of_chunks(file, start, end, layout)
        if stop is not None:
            return stop
    return None


def _end_of_chunks(file: BinaryIO, at: int, end: int, layout: _Layout) -> int | None:
    while at + layout.header <= end:
        if _layout(_read(file, at, 48)) is not None:
            return at  # an appended file
        if layout is _AU:
            return None
        chunk, size = _chunk(file, at, layout)
        if not all(0x20 <= letter < 0x7F for letter in chunk) or not 0 <= size <= end - at - layout.header:
            return end if _read(file, at, 8).startswith(_TAGS + _CHUNKS_BEHIND) else None
        at = _aligned(at + layout.header + size, at, layout)
    return end


def _chunk(file: BinaryIO, at: int, layout: _Layout) -> tuple[bytes, int]:
    """Name (its first four bytes) and size of the content."""
    header = _read(file, at, layout.header)
    size = int.from_bytes(header[layout.name_bytes :], layout.order)
    return header[:4], size - layout.header if layout.own_header else size


def _aligned(at: int, origin: int, layout: _Layout) -> int:
    return at + (origin - at) % layout.align


def _check_sphere(file: BinaryIO, start: int, end: int, name: str) -> None:
    """NIST SPHERE, as in LDC's corpora: text fields state the samples."""
    header = _read(file, start, 1024).decode("latin-1")
    size = re.match(r"NIST_1A\s+(\d+)", header)
    fields = dict(re.findall(r"^(\w+) -i (\d+)\s*$", header, re.MULTILINE))
    if size is None or "sample_count" not in fields:
        return
    companded = re.search(r"^sample_coding -s\d+ \w*[ua]law", header, re.MULTILINE)
    frame = int(fields.get("channel_count", 1)) * (1 if companded else int(fields.get("sample_n_bytes", 2)))
    declared, room = int(fields["sample_count"]) * frame, end - start - int(size[1])
    if room < declared and "shorten" not in header:
        raise AudioError(f"{name}: cut off, {room} of {declared} bytes are there", "truncated")


# --- FLAC -------------------------------------------------------------------------------------------

_FLAC_START = b"fLaC\x00\x00\x00\x22"  # marker and header of the first block, 34 bytes long
_FLAC_MOST = (1 << 36) - 1  # samples
_FLAC_TAIL_BYTES = 1 << 17
_BLOCK_SIZES = {1: 192, **{code: 576 << (code - 2) for code in range(2, 6)}} | {
    code: 256 << (code - 8) for code in range(8, 16)
}


def _flac_parts(file: BinaryIO, start: int, end: int, name: str) -> list[Part]:
    starts = [start, *_find_all(file, _FLAC_START, start + 4, end)]
    return [
        _flac_part(file, begin, stop, name) for begin, stop in zip(starts, [*starts[1:], end], strict=True)
    ]


def _flac_part(file: BinaryIO, start: int, end: int, name: str) -> Part:
    """The last frame's number gives the number of samples; the header's total may be 0 or wrong."""
    info = _read(file, start + 8, 34)
    packed = int.from_bytes(info[10:18], "big")
    declared = packed & _FLAC_MOST
    unknown = declared in (0, _FLAC_MOST)
    first = start + 4
    while first < end:
        block = _read(file, first, 4)
        first += 4 + int.from_bytes(block[1:], "big")
        if block[:1] >= b"\x80":
            break
    tail_bytes = max(_FLAC_TAIL_BYTES, 2 * int.from_bytes(info[7:10], "big"))
    tail_start = max(first, end - tail_bytes)
    tail = _read(file, tail_start, end - tail_start)
    sync = _read(file, first, 2)
    if sync not in (b"\xff\xf8", b"\xff\xf9"):
        return Part(start, end)
    block_size = int.from_bytes(info[2:4], "big")
    at = len(tail)
    while (at := tail.rfind(sync, 0, at)) >= 0:
        span = _flac_frame(tail[at : at + 20], block_size)
        if span is None:
            continue
        found = span[1]
        if unknown and _crc(tail[at:], 16, 0x8005):
            found = span[0]  # the recorder was killed while writing this frame
        if found < declared and not unknown:
            raise AudioError(f"{name}: cut off, {found} of {declared} samples are there", "truncated")
        if found == declared:
            return Part(start, end)
        return Part(start, end, ((start + 18, (packed - declared + found).to_bytes(8, "big")),))
    return Part(start, end)


def _flac_frame(header: bytes, block_size: int) -> tuple[int, int] | None:
    """First sample and end of the frame that starts here; None if none does."""
    if len(header) < 6 or header[3] & 1:
        return None
    number, used = header[4], 1
    if number >= 0x80:  # coded as in UTF-8, up to 36 bits
        used = 8 - (number ^ 0xFF).bit_length()
        if not 2 <= used <= 7 or len(header) < 4 + used + 3:
            return None
        number &= (1 << (7 - used)) - 1
        for byte in header[5 : 4 + used]:
            number = number << 6 | byte & 0x3F
    at, code = 4 + used, header[2] >> 4
    wide = {6: 1, 7: 2}.get(code, 0)
    samples = _BLOCK_SIZES.get(code) or int.from_bytes(header[at : at + wide], "big") + 1
    at += wide + {12: 1, 13: 2, 14: 2}.get(header[2] & 15, 0)
    if code == 0 or at >= len(header) or _crc(header[: at + 1], 8, 0x07):
        return None
    first = number if header[1] & 1 else number * block_size  # variable or fixed block size
    return first, first + samples


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Cyclic redundancy check; 0 for data that ends with its own checksum."""
    top, mask, value = 1 << (bits - 1), (1 << bits) - 1, 0
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
    return value


# --- Ogg --------------------------------------------------------------------------------------------


def _ogg_parts(file: BinaryIO, start: int, end: int) -> list[Part]:
    """The links of a chained file: each begins with pages flagged as the beginning of a stream."""
    starts, at, in_beginning = [start], start, True
    while at + 27 <= end:
        page = _read(file, at, 27 + 255)
        if page[:4] != b"OggS":
            at = next(_find_all(file, b"OggS", at + 1, end), end)
            continue
        beginning = bool(page[5] & 2)
        if beginning and not in_beginning:
            starts.append(at)
        in_beginning = beginning
        at += 27 + page[26] + sum(page[27 : 27 + page[26]])
    return [Part(begin, stop) for begin, stop in zip(starts, [*starts[1:], end], strict=True)]


# --- bytes ------------------------------------------------------------------------------------------


def _after_id3(file: BinaryIO) -> int:
    """Start of the audio, after any ID3v2 tags."""
    at = 0
    while (size := mp3.id3_bytes(_read(file, at, 10))) > 0:
        at += size
    return at


def _find_all(file: BinaryIO, wanted: bytes, start: int, end: int) -> Iterator[int]:
    """Offsets of ``wanted``, read in pieces that overlap by its length."""
    piece = 1 << 20
    for begin in range(start, end, piece):
        block = _read(file, begin, min(piece + len(wanted) - 1, end - begin))
        at = block.find(wanted)
        while at >= 0:
            yield begin + at
            at = block.find(wanted, at + 1)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(max(0, count))
