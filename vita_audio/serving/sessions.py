"""Open realtime connections, counted by API key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from vita_audio.serving.errors import ApiError


class Sessions:
    """The open connections of one server, or of one gateway in front of several.

    Args:
        most: connections that a key may have open.
    """

    def __init__(self, most: int):
        self._most = most
        self._open: Counter[str] = Counter()

    @contextmanager
    def opened(self, key: str) -> Generator[None, None, None]:
        """Count a connection of a key while the context is open; the key is empty if the server has none.

        Raises:
            ApiError: the key has as many as it may have.
        """
        if self._open[key] >= self._most:
            whose = "of this key " if key else ""
            message = f"{self._most} connections {whose}are open already"
            raise ApiError(message, None, 429, "too_many_sessions")
        self._open[key] += 1
        try:
            yield
        finally:
            self._open[key] -= 1
            if not self._open[key]:
                del self._open[key]
