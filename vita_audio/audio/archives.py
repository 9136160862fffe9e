"""Clips inside uncompressed tar archives, read without unpacking.

A path that goes through an archive names a member: ``clips.tar/a/b.wav`` is the member ``a/b.wav`` of ``clips.tar``.
The first clip of an archive costs one pass over its headers, then each costs one read, while the archive is among
the last 64 that this process used. A corpus of a million clips is then a few hundred files, which every file system
can hold. Read clips in the order of their paths where possible; training takes codes and features from caches.
"""

from __future__ import annotations

import errno
import os
import tarfile
from functools import lru_cache

_MARK = ".tar/"
_OPEN_ARCHIVES = 64
"""Archives whose member lists are kept: about 200 bytes per clip."""


def file_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of a file, or of a member of an archive.

    Raises:
        OSError: there is none.
    """
    place = _place(path)
    return os.path.getsize(path) if place is None else place[2]


def stored_size(path: str | os.PathLike[str]) -> int:
    """Size in bytes of what holds a clip: its file, or the whole archive. Caches compare it to notice a change.

    Unlike :func:`file_size` it reads no headers of an archive, so a cached clip costs the same anywhere.

    Raises:
        OSError: there is none.
    """
    name = os.fspath(path)
    return os.path.getsize((_archive_of(name) if _MARK in name else None) or name)


def is_stored(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there, or the archive that should hold it; reads no headers."""
    name = os.fspath(path)
    return os.path.exists(name) or (_MARK in name and _archive_of(name) is not None)


def file_exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a file, a folder, or a member of an archive."""
    if os.path.exists(path):
        return True
    try:
        return _place(path) is not None
    except OSError:
        return False


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Content of a file, or of a member of an archive.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    place = _place(path)
    archive, start, size = place or (path, 0, -1)
    with open(archive, "rb") as file:
        file.seek(start)
        return file.read(size)


def is_member(path: str | os.PathLike[str]) -> bool:
    """Whether a path goes through a file named ``.tar``, so that it can only name a member."""
    name = os.fspath(path)
    return _MARK in name and not os.path.exists(name) and _archive_of(name) is not None


def _place(path: str | os.PathLike[str]) -> tuple[str, int, int] | None:
    """Archive, offset and size of a member; None for a path that goes through no archive."""
    name = os.fspath(path)
    archive = _archive_of(name) if _MARK in name else None
    if archive is None:
        return None
    stat = os.stat(archive)
    member = name[len(archive) + 1 :]
    found = _members(archive, stat.st_size, stat.st_mtime_ns).get(member)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"{archive} has no member {member}", name)
    return archive, *found


def _archive_of(name: str) -> str | None:
    at = name.find(_MARK)
    while at >= 0:
        archive = name[: at + len(_MARK) - 1]
        if os.path.isfile(archive):
            return archive
        at = name.find(_MARK, at + 1)
    return None


@lru_cache(maxsize=_OPEN_ARCHIVES)
def _members(archive: str, size: int, mtime_ns: int) -> dict[str, tuple[int, int]]:
    """Offset and size of each file in an archive; a damaged end hides the members after it, not those before."""
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                if member.isfile():
                    members[member.name.removeprefix("./")] = (member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        if not members:
            raise OSError(errno.EINVAL, f"not an uncompressed tar archive ({error})", archive) from error
    return members
