"""The makers of the embedded world, as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def maker() -> Iterator[Callable[[str], ModuleType]]:
    """The module of tools/quickstart of that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tools" / "quickstart"))
        yield importlib.import_module
