"""The length of an MP3, by counting its frames.

An MP3 does not store its length. A leading ``Xing`` or ``Info`` frame may state one; without it libsndfile
guesses from the first frame's bit rate, which is wrong for variable rates. Joined files have several.
"""

from __future__ import annotations

from typing import BinaryIO, NamedTuple

from vita_audio.audio.base import AudioError

LENGTH_TOLERANCE = 0.05
"""Lossy formats state slightly inexact lengths, so only a clear shortfall counts as truncation."""

_KBITS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = (44_100, 48_000, 32_000)
_PREFIX_BIT_RATE = 9  # index; its frames are long enough for a Xing header


class _Frame(NamedTuple):
    """Bytes and samples of a layer III frame, and the offset at which a Xing header would be."""

    bytes: int
    samples: int
    xing: int


class _Run:
    """Frames of one encoder: their start, their number, and the number that their header states."""

    def __init__(self, start: int, first: bytes, kind: tuple[int, int, bool]):
        self.start = start
        self.first = first  # header of the first frame
        self.kind = kind
        self.frames = 0
        self.count_at: int | None = None  # offset of the stated number of frames
        self.stated = 0


def is_frame(head: bytes) -> bool:
    """Whether these bytes begin a layer III frame."""
    return _frame(head) is not None


def id3_bytes(head: bytes) -> int:
    """Length of the ID3v2 tag that starts here; 0 if none does."""
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if head[5] & 0x10 else 0)


def find_parts(
    file: BinaryIO, start: int, end: int, name: str
) -> list[tuple[int, int, tuple[tuple[int, bytes], ...], bytes]]:
    """Recordings as the fields of :class:`~vita_audio.audio.containers.Part`; see its ``find_parts``."""
    runs = _runs(file, start, end)
    parts = []
    for run, stop in zip(runs, [*(run.start for run in runs[1:]), end], strict=True):
        edits: tuple[tuple[int, bytes], ...] = ()
        prefix = b""
        if run.count_at is None:
            prefix = _xing_frame(run.first, run.frames)
        elif run.frames < (1 - LENGTH_TOLERANCE) * run.stated:
            raise AudioError(f"{name}: cut off, {run.frames} of {run.stated} frames are there", "truncated")
        elif run.frames != run.stated:
            edits = ((run.count_at, run.frames.to_bytes(4, "big")),)
        parts.append((run.start, stop, edits, prefix))
    if len(parts) == 1 and not parts[0][2] and not parts[0][3]:
        return [(0, end, (), b"")]
    return parts


def _runs(file: BinaryIO, start: int, end: int) -> list[_Run]:
    """Walk all frames; a Xing or Info frame, or another kind of frame, begins a new recording."""
    runs: list[_Run] = []
    at = start
    while at + 4 <= end:
        file.seek(at)
        head = file.read(64)
        frame = _frame(head)
        if frame is None:
            at = _resynchronise(file, at, end)
            continue
        if at + frame.bytes > end:  # cut off inside a frame
            break
        stated = _is_xing(head, frame)
        # Fields that cannot change within a recording: version, sample rate, mono or not.
        kind = (head[1] & 0xFE, head[2] & 0x0C, head[3] >> 6 == 3)
        if not runs or (runs[-1].frames and (stated or kind != runs[-1].kind)):
            runs.append(_Run(at, head[:4], kind))
        run = runs[-1]
        if stated:
            if head[frame.xing + 7] & 1 and run.count_at is None:
                run.count_at = at + frame.xing + 8
                run.stated = int.from_bytes(head[frame.xing + 8 : frame.xing + 12], "big")
        else:
            run.frames += 1
        at += frame.bytes
    return [run for run in runs if run.frames]


def _resynchronise(file: BinaryIO, at: int, end: int) -> int:
    """The next frame after tags or junk; requires two in a row, since one may be a coincidence."""
    file.seek(at)
    head = file.read(32)
    if (size := id3_bytes(head)) > 0:
        return at + size
    if head[:3] == b"TAG":
        return at + 128
    if head[:8] == b"APETAGEX":
        return at + 32 + int.from_bytes(head[12:16], "little")
    at += 1
    while at < end:
        file.seek(at)
        block = file.read(1 << 16)
        found = block.find(b"\xff")
        while found >= 0:
            file.seek(at + found)
            frame = _frame(file.read(4))
            if frame is not None:
                file.seek(at + found + frame.bytes)
                if is_frame(file.read(4)):
                    return at + found
            found = block.find(b"\xff", found + 1)
        at += len(block)
    return end


def _frame(head: bytes) -> _Frame | None:
    """The layer III frame that starts with these bytes (ISO 11172-3, section 2.4.1.3)."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, head[1] >> 1 & 3
    bit_rate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer != 1 or bit_rate in (0, 15) or rate == 3:
        return None
    first_version, mono = version == 3, head[3] >> 6 == 3
    kbits = (_KBITS_1 if first_version else _KBITS_2)[bit_rate]
    samples = 1152 if first_version else 576
    hertz = _RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
    size = samples // 8 * kbits * 1000 // hertz + (head[2] >> 1 & 1)
    side = (17 if mono else 32) if first_version else (9 if mono else 17)
    return _Frame(size, samples, 4 + side + (0 if head[1] & 1 else 2))


def _is_xing(head: bytes, frame: _Frame) -> bool:
    return head[frame.xing : frame.xing + 4] in (b"Xing", b"Info") and len(head) >= frame.xing + 12


def _xing_frame(first: bytes, frames: int) -> bytes:
    """A frame like ``first`` that states the number of frames that follow."""
    header = bytes([0xFF, first[1] | 1, _PREFIX_BIT_RATE << 4 | first[2] & 0x0C, first[3]])
    frame = _frame(header)
    assert frame is not None
    stated = header.ljust(frame.xing, b"\0") + b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return stated.ljust(frame.bytes, b"\0")
