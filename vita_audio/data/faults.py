"""Separates machine faults from data faults.

A broken sample is skipped. A full disk, an unwritable cache, a lost mount or a codec that does not open would
cause every sample to be skipped, one by one and for the wrong reason, so such a fault ends the run at once.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import torch

NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""Error numbers of a file or folder that this process may not write."""

_MACHINE_ERRORS = frozenset(
    {
        *NOT_WRITABLE,
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # disk full
        *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),  # disk or mount lost
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
_NO_CPU_MEMORY = "DefaultCPUAllocator: "
"""Part of PyTorch's message where an allocation fails; it has no type of its own."""
_NO_ROOM = "Not enough disk space"
"""Start of the error message of ``datasets``, which sets no errno."""


class MachineError(OSError):
    """The machine failed, not the data. The message says what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


def machine_fault(error: BaseException) -> str | None:
    """A description of the machine fault behind an error; None for a fault of the data.

    Running out of memory is a machine fault, except where a reader has named the data as its cause, such as a
    header that states an absurd length.
    """
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_CPU_MEMORY in str(error)):
        return "out of memory"
    for one in _with_causes(error):
        if isinstance(one, MachineError):
            return str(one)
        if isinstance(one, (torch.OutOfMemoryError, torch.AcceleratorError)):
            return first_line(one)
        if isinstance(one, OSError) and one.errno in _MACHINE_ERRORS:
            where = f"{one.filename}: " if one.filename else ""
            return f"{where}{one.strerror}"
        if isinstance(one, OSError) and str(one).startswith(_NO_ROOM):
            return str(one)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters, with its type."""
    message = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__
