"""What tests of the corpora share: a miniature of each publisher's release, and short clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from miniatures import MINIATURES, Expected
from miniatures.files import clip


@pytest.fixture(scope="session")
def miniatures() -> dict[str, Callable[[Path], Expected]]:
    """A maker for each set of the published mix: it writes a release into a folder, and returns what it must give."""
    return MINIATURES


@pytest.fixture(scope="session")
def sound() -> Callable[..., bytes]:
    """Content of a short audio file, by seed and format."""
    return clip
