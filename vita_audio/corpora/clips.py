"""Clips of a unit: decoded for the checks, and placed where training finds them.

An audio file, or a member of an uncompressed tar archive, stays where it is. Anything else (content of a Parquet
file or of a compressed archive, a part of a long recording) is written: by default into one tar archive per unit,
which keeps the number of files small, or into single files. With ``"stay"`` content of a Parquet file stays there
too. Encoded content is written unchanged; parts are written as FLAC.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tempfile
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from torch import Tensor

from vita_audio.audio import load_audio, save_audio
from vita_audio.chat import locate_file
from vita_audio.corpora.items import Clip
from vita_audio.files import whole_file, write_bytes

_SUFFIXES = {
    b"RIFF": ".wav",
    b"fLaC": ".flac",
    b"OggS": ".ogg",
    b"ID3": ".mp3",
    b"\xff\xfb": ".mp3",
    b"\xff\xf3": ".mp3",
}


def decode(clip: Clip) -> tuple[Tensor, int]:
    """A clip as one channel, (samples,), at its own rate.

    Raises:
        AudioError: it cannot be read.
    """
    if clip.start == 0 and clip.end is None:
        return load_audio(clip.audio)
    waveform, rate = _recording(clip.audio)
    end = len(waveform) if clip.end is None else round(clip.end * rate)
    return waveform[round(clip.start * rate) : end].clone(), rate


@lru_cache(maxsize=1)
def _recording(audio: str | bytes) -> tuple[Tensor, int]:
    """The last long recording, kept while its parts are cut."""
    return load_audio(audio)


class ClipStore:
    """Places the clips of one unit; a context manager that writes all of them or, after an error, none.

    Args:
        root: the data root.
        output: the file that names the clips, below the root.
        folder: of the unit's clips below it, without suffix.
        kind: ``"tar"``, ``"files"`` or ``"stay"``.
    """

    def __init__(self, root: Path, output: Path, folder: str, kind: str) -> None:
        self._root, self._folder, self._kind = root, folder, kind
        self._bases = [os.path.abspath(output.parent), os.path.abspath(root)]
        self._stack = ExitStack()
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> ClipStore:
        self._stack.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def place(self, name: str, clip: Clip, waveform: Tensor, rate: int) -> str:
        """Path of a clip for a sample: relative to the output's folder or the data root if below one, else absolute."""
        if isinstance(clip.audio, str) and clip.is_whole_file:
            return self._short(clip.audio)
        if self._kind == "stay" and clip.row and clip.start == 0 and clip.end is None:
            return self._short(clip.row)
        encoded = isinstance(clip.audio, bytes) and clip.start == 0 and clip.end is None
        content = clip.audio if encoded and isinstance(clip.audio, bytes) else _flac(waveform, rate)
        file = re.sub(r"[^\w.+-]", "_", name)[-150:] + (_suffix(content, clip.suffix) if encoded else ".flac")
        if self._kind == "files":
            path = locate_file(f"{self._folder}/{file}", self._root, self._root)
            write_bytes(path, content)
            return self._short(path)
        member = tarfile.TarInfo(file)  # no times and no owners: the same clips give the same bytes
        member.size = len(content)
        self._open_tar().addfile(member, io.BytesIO(content))
        return self._short(f"{self._archive}/{file}")

    def _short(self, path: str) -> str:
        absolute = os.path.abspath(path)
        base = next((base for base in self._bases if absolute.startswith(base + os.sep)), None)
        return absolute if base is None else os.path.relpath(absolute, base)

    @property
    def _archive(self) -> str:
        return locate_file(f"{self._folder}.tar", self._root, self._root)

    def _open_tar(self) -> tarfile.TarFile:
        if self._tar is None:
            temporary = self._stack.enter_context(whole_file(self._archive))
            self._tar = self._stack.enter_context(
                tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115  (the stack closes it)
            )
        return self._tar


def _flac(waveform: Tensor, rate: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.flac"
        save_audio(path, waveform, rate)
        return path.read_bytes()


def _suffix(content: bytes, given: str) -> str:
    found = next((suffix for start, suffix in _SUFFIXES.items() if content.startswith(start)), None)
    return found or given.lower() or ".audio"
