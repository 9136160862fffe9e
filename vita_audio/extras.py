"""Import errors of optional parts of the package state how to install the missing extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Import a part of the package that needs libraries from an extra of setup.py.

    Raises:
        ModuleNotFoundError: a library is not installed; the message says which, and the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library in ("", "vita_audio") or "pip install" in str(error):
            raise
        message = f"{library} is not installed; run pip install -e '.[{extra}]' in the repository"
        raise ModuleNotFoundError(message, name=error.name) from error
