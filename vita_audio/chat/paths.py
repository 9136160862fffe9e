"""One rule for relative paths in mixes, samples and test sets.

A relative path is resolved against the data root, then against the folder of the file that names it. The data
root is the caller's choice (``--data_root``, ``DATA_ROOT``), else ``$ROOT_PATH``, else the folder of the mix or
test set. Below it, ``datasets/…`` also means ``data/…``: in the published code's working folder ``datasets`` is
a link to ``$ROOT_PATH/data``, and published mixes and JSON files use such paths. A path may go through a tar
archive (:mod:`vita_audio.audio.archives`).
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path, PurePath

from vita_audio.audio.archives import is_stored

_PUBLISHED_LINK, _PUBLISHED_FOLDER = "datasets", "data"


def locate_file(path: str, data_root: str | PathLike[str], beside: str | PathLike[str]) -> str:
    """Resolve a path that a mix, a sample or a test set names.

    Args:
        path: as written in that file; an absolute path is returned unchanged.
        data_root: base folder of relative paths.
        beside: folder of the file that names it.

    Returns:
        The first location where the file exists, else the expected location below ``data_root``.
    """
    if os.path.isabs(path):
        return path
    expected = os.path.join(data_root, path)
    places = [expected]
    first, *rest = PurePath(path).parts or ("",)
    if first == _PUBLISHED_LINK:
        folder = os.path.join(data_root, _PUBLISHED_FOLDER)
        places.append(os.path.join(folder, *rest))
        if os.path.isdir(folder) and not os.path.isdir(os.path.join(data_root, _PUBLISHED_LINK)):
            expected = places[1]
    places.append(os.path.join(beside, path))
    return next((place for place in places if is_stored(place)), expected)


def default_data_root(file: str | PathLike[str]) -> Path:
    """The default data root: ``$ROOT_PATH``, else the folder of the mix or test set ``file``."""
    root = os.environ.get("ROOT_PATH")
    return Path(root) if root else Path(file).parent
