"""Clips inside uncompressed tar archives and Parquet files, read without unpacking.

A path that goes through an archive names a member: ``clips.tar/a/b.wav`` is the member ``a/b.wav`` of ``clips.tar``,
``clips.parquet/audio/17`` is row 17 (from 0) of the column ``audio`` of ``clips.parquet``. A corpus of a million clips
is then a few hundred files, which every file system can hold.

The first clip of a tar archive costs one pass over its headers, then each costs one read, while the archive is among
the last 64 that this process used. :mod:`vita_audio.audio.parquet_clips` says what a row costs. Read clips in
the order of their paths where possible; training takes codes and features from caches.
"""

from __future__ import annotations

import errno
import os
import re
import tarfile
from functools import lru_cache

from vita_audio.audio.parquet_clips import find_clip, read_clip

_MARK = re.compile(r"\.(?:tar|parquet)(?=/)")
_OPEN_ARCHIVES = 64
"""Tar archives whose member lists are kept: about 200 bytes per clip."""


def file_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of a file, or of a member of an archive.

    Raises:
        OSError: there is none.
    """
    place = _place(path)
    if place is None:
        return os.path.getsize(path)
    return len(read_clip(*place)) if _is_parquet(place[0]) else _tar_member(*place)[1]


def stored_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of what holds a clip: its file, or the whole archive. Caches compare it to notice a change.

    Unlike :func:`file_size` it does not look into an archive, so a cached clip costs the same anywhere.

    Raises:
        OSError: there is none.
    """
    place = _place(path)
    return os.path.getsize(path if place is None else place[0])


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder exists, or the archive that should hold it; does not look into the archive."""
    return os.path.exists(path) or _place(path) is not None


def file_exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file, a folder, or a member of an archive."""
    if os.path.exists(path):
        return True
    place = _place(path)
    if place is None:
        return False
    try:
        (find_clip if _is_parquet(place[0]) else _tar_member)(*place)
    except OSError:
        return False
    return True


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Content of a file, or of a member of an archive.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    place = _place(path)
    if place is not None and _is_parquet(place[0]):
        return read_clip(*place)
    archive, (start, size) = (path, (0, -1)) if place is None else (place[0], _tar_member(*place))
    with open(archive, "rb") as file:
        file.seek(start)
        return file.read(size)


def is_member(path: str | os.PathLike[str]) -> bool:
    """Whether a path goes through a file that is named as an archive, so that it can only name a member."""
    return _place(path) is not None and not os.path.exists(path)


def _place(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Archive and member; None for a path that goes through no archive."""
    name = os.fspath(path)
    archives = (name[: mark.end()] for mark in _MARK.finditer(name))
    archive = next((archive for archive in archives if os.path.isfile(archive)), None)
    return None if archive is None else (archive, name[len(archive) + 1 :])


def _is_parquet(archive: str) -> bool:
    return archive.endswith(".parquet")


def _tar_member(archive: str, member: str) -> tuple[int, int]:
    """Offset and size."""
    stat = os.stat(archive)
    found = _tar_members(archive, stat.st_size, stat.st_mtime_ns).get(member)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"{archive} has no member {member}", f"{archive}/{member}")
    return found


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _tar_members(archive: str, size: int, mtime_ns: int) -> dict[str, tuple[int, int]]:
    """Offset and size of each file, of two with one name the first; a damaged end hides only the members after it."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isfile():
                    members.setdefault(member.name.removeprefix("./"), (member.offset_data, member.size))
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        if not members:
            raise OSError(errno.EINVAL, f"not an uncompressed tar archive ({error})", archive) from error
    return members
