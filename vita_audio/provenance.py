"""The origin of a result: ``run.json``, written next to the output of every command.

It holds the command, its resolved arguments, library versions, the git revision of this code, and a
fingerprint of the data.
"""

from __future__ import annotations

import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vita_audio.distributed import world_size

RUN_FILE = "run.json"
_PACKAGES = (
    "vita-audio",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "torchdata",
    "numpy",
)


def describe_run(command: str, arguments: Mapping[str, Any], data: Any, **more: Any) -> dict[str, Any]:
    """The content of ``run.json``.

    Args:
        command: name of the command.
        arguments: every resolved option, including defaults; values that JSON cannot represent become text.
        data: identifies the data, for example by a fingerprint of the mix.
        more: further fields.
    """
    return {
        "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "processes": world_size(),
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        "data": data,
        "git": git_revision(),
        "versions": versions(),
        **more,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def git_revision() -> dict[str, Any] | None:
    """``revision`` and ``modified`` (whether tracked files differ) of this code's checkout; None outside one."""
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None  # installed in a folder inside another repository
        modified = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"revision": git("rev-parse", "HEAD"), "modified": modified}
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
