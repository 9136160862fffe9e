"""The data mix: which samples, how often, in which order.

A YAML file names data sets, each with its files, a ``ratio`` (above 1 repeats, below 1 takes a subset) and a
cap ``num`` per file (section 7 of the data specification). The mix defines one endless stream of
samples that depends only on the seed: position ``p`` of the stream belongs to epoch ``p // len(mix)``,
and within an epoch the order is a pseudo-random permutation. Permutations are computed, not stored, so
a mix of a hundred million samples needs no memory, and any position is available directly: sharding
and resuming become arithmetic.

A file with ratio below 1 contributes different rows in each epoch until all have been seen. With ratio above 1
the numbers of times that rows occur differ by at most one.
"""

from __future__ import annotations

import bisect
import hashlib
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from vita_audio.chat import default_data_root, locate_file
from vita_audio.data.sources import MissingSource, Rows, SourceError
from vita_audio.data.temperature import tempered_ratios
from vita_audio.files import content_fingerprint
from vita_audio.strict_yaml import load_yaml

logger = logging.getLogger(__name__)


class MixError(ValueError):
    """A mix that cannot be used. The message names file, data set and what to do."""


@dataclass(frozen=True)
class SourceSpec:
    """One file of the mix, as configured.

    Attributes:
        dataset: name of its data set.
        path: path of the file.
        ratio: share of its rows used in an epoch; may exceed 1.
        num: at most this many samples in an epoch.
        temperature: of the mix, which then decides the ratio; None: the ratio is as given.
    """

    dataset: str
    path: Path
    ratio: float
    num: float = math.inf
    temperature: float | None = None

    def samples_per_epoch(self, rows: int) -> int:
        return int(min(int(rows * self.ratio), self.num))

    @property
    def name(self) -> str:
        """Its name in counters and reports."""
        return f"{self.dataset}/{self.path.stem}"


@dataclass(frozen=True)
class FileState:
    """A file of the mix, as found on this machine.

    Attributes:
        name: name of its source.
        path: the resolved path.
        rows: samples in it; 0 if it is missing.
        bytes: its size.
        used: samples in an epoch.
        content: see :func:`vita_audio.files.content_fingerprint`; empty if the file is missing.
    """

    name: str
    path: str
    rows: int = 0
    bytes: int = 0
    used: int = 0
    content: str = ""


@dataclass(frozen=True)
class Place:
    """The file and row at a stream position."""

    position: int
    epoch: int
    source: int
    row: int


def read_mix(path: str | Path, data_root: str | Path | None = None) -> list[SourceSpec]:
    """Read a mix's YAML.

    ``${NAME}`` in paths is expanded from the environment; relative paths are resolved by :mod:`vita_audio.chat.paths`.
    A key without a value counts as missing.

    Args:
        path: the YAML file.
        data_root: base folder of relative paths. None: ``$ROOT_PATH``, else the YAML file's folder.

    Raises:
        MixError: the file cannot be read, or an entry is invalid.
    """
    path = Path(path)
    try:
        config = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MixError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    named = config.get("dataset") if isinstance(config, Mapping) else None
    if not isinstance(named, Mapping) or not named:
        raise MixError(f"{path}: needs a section 'dataset' with at least one data set")
    root = Path(data_root) if data_root else default_data_root(path)
    temperature = config.get("temperature")
    if temperature is not None and (
        isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not temperature >= 1
    ):
        raise MixError(f"{path}: 'temperature' must be a number of 1 or more, it is {temperature!r}")
    return [
        spec
        for name, entry in named.items()
        for spec in _read_entry(path, str(name), entry, root, temperature)
    ]


_KNOWN_FIELDS = {"ratio", "num", "data_paths"}
_HIGHEST_RATIO = 1e6


def _read_entry(file: Path, name: str, entry: Any, root: Path, temperature: float | None) -> list[SourceSpec]:
    where = f"{file}: data set {name!r}"
    if not isinstance(entry, Mapping):
        raise MixError(f"{where} must have 'data_paths' and may have 'ratio' and 'num'")
    unknown = set(map(str, entry)) - _KNOWN_FIELDS
    if unknown:
        raise MixError(
            f"{where}: unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(_KNOWN_FIELDS))}"
        )
    paths = entry.get("data_paths")
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not paths or not all(isinstance(item, str) and item for item in paths):
        raise MixError(f"{where}: 'data_paths' must list one or more files")
    ratio = _number(where, "ratio", entry.get("ratio"), 1.0)
    if temperature is not None and ratio != 0 and entry.get("ratio") is not None:
        raise MixError(
            f"{where}: the mix has a temperature, which replaces 'ratio'; remove one (0 excludes a set)"
        )
    num = _number(where, "num", entry.get("num"), math.inf)
    if num != math.inf and num and len(paths) > 1:
        logger.info("%s: 'num' limits each of its %d files, not their sum", where, len(paths))
    return [SourceSpec(name, _expand(where, item, root, file), ratio, num, temperature) for item in paths]


def _number(where: str, field: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise MixError(f"{where}: {field!r} must be a number of 0 or more, it is {value!r}")
    if field == "ratio" and value > _HIGHEST_RATIO:
        raise MixError(f"{where}: {field!r} must be finite and at most {_HIGHEST_RATIO:g}, it is {value:g}")
    return float(min(value, 1e15))  # an integer of hundreds of digits is no float


def _expand(where: str, path: str, root: Path, file: Path) -> Path:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise MixError(f"{where}: {path} needs the environment variable {name}; export it")
        return os.environ[name]

    expanded = os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, path))
    return Path(locate_file(expanded, root, file.parent))


class Mix:
    """The endless stream of samples.

    Args:
        specs: the files, from :func:`read_mix`.
        seed: seed of all shuffling.
        strict: refuse a mix with a missing file instead of continuing without it.
        cache_dir: passed to :class:`Rows`.

    Attributes:
        specs: the files in use.
        used: samples of each file in one epoch.
        in_use: the state of each of them.
        files: every file that the mix names, including missing ones.
        missing: one line for each file that is missing or holds no samples.

    Raises:
        MixError: no file can be used; a file exists but cannot be read; or, with ``strict``, a file is missing.
        MachineError: the disk or the Arrow cache failed.
    """

    def __init__(
        self, specs: list[SourceSpec], seed: int, *, strict: bool = False, cache_dir: str | None = None
    ) -> None:
        self.seed = seed
        self.specs: list[SourceSpec] = []
        self.rows: list[Rows] = []
        self.files: list[FileState] = []
        self.missing: list[str] = []
        opened: dict[Path, Rows] = {}
        unreadable: list[str] = []
        for spec in _tempered(specs, opened, cache_dir):
            if spec.ratio == 0 or spec.num == 0:
                continue
            try:
                if spec.path not in opened:
                    opened[spec.path] = Rows(spec.path, cache_dir)
            except MissingSource as error:
                self.missing.append(f"{spec.dataset}: {error}")
                self.files.append(FileState(spec.name, str(spec.path)))
                continue
            except SourceError as error:
                unreadable.append(f"{spec.dataset}: {error}")
                continue
            rows = len(opened[spec.path])
            used = spec.samples_per_epoch(rows)
            size, content = spec.path.stat().st_size, content_fingerprint([spec.path])
            self.files.append(FileState(spec.name, str(spec.path), rows, size, used, content))
            if rows == 0:
                self.missing.append(f"{spec.dataset}: {spec.path}: holds no samples")
                continue
            if used == 0:
                logger.warning("%s: %s contributes no samples at this ratio and num", spec.dataset, spec.path)
                continue
            self.specs.append(spec)
            self.rows.append(opened[spec.path])
        if unreadable:
            raise MixError("; ".join(unreadable))
        self.in_use = [state for state in self.files if state.used]
        self.used = [state.used for state in self.in_use]
        self._ends = list(accumulate(self.used))
        self._report_missing(strict)

    def _report_missing(self, strict: bool) -> None:
        report = "".join(f"\n  {line}" for line in self.missing)
        if self.missing and strict:
            raise MixError(f"{len(self.missing)} files of the mix are missing:{report}")
        if not self.specs:
            raise MixError(f"the mix has no samples; check its paths, ratios and nums{report}")
        if self.missing:
            logger.warning("%d files of the mix are missing and left out:%s", len(self.missing), report)

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """A digest that changes with the stream: with its order, or with the content of a file."""
        parts = [self.order_fingerprint, *(state.content for state in self.in_use)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def order_fingerprint(self) -> str:
        """A digest of what determines the order of the stream: names and numbers of samples, and the seed."""
        parts = [
            f"{spec.name}:{len(rows)}:{used}"
            for spec, rows, used in zip(self.specs, self.rows, self.used, strict=True)
        ]
        return hashlib.sha256("\n".join([str(self.seed), *parts]).encode()).hexdigest()[:16]

    def place(self, position: int) -> Place:
        """The file and row at a position of the stream."""
        epoch, index = divmod(position, len(self))
        entry = permuted(index, len(self), _key(self.seed, "epoch", epoch))
        source = bisect.bisect_right(self._ends, entry)
        within = entry - (self._ends[source - 1] if source else 0)
        rows = len(self.rows[source])
        # Each epoch continues the file's own permutation where the last one stopped.
        draw = (epoch * self.used[source] + within) % rows
        return Place(position, epoch, source, permuted(draw, rows, _key(self.seed, "file", source)))

    def raw(self, place: Place) -> str | Mapping[str, Any]:
        """The raw sample at a position.

        Raises:
            SampleError: the row cannot be read.
        """
        return self.rows[place.source][place.row]


def _tempered(specs: list[SourceSpec], opened: dict[Path, Rows], cache_dir: str | None) -> list[SourceSpec]:
    """The specs, with the ratios that the mix's temperature gives them; files are opened into ``opened``."""
    rows: Counter[str] = Counter()
    for spec in specs:
        if spec.temperature is not None and spec.ratio and spec.num:
            with suppress(SourceError):  # the caller opens it again, and says why it cannot
                opened[spec.path] = opened.get(spec.path) or Rows(spec.path, cache_dir)
                rows[spec.dataset] += len(opened[spec.path])
    if not rows.total():
        return specs
    ratios = tempered_ratios(rows, next(spec.temperature for spec in specs if spec.temperature))
    return [replace(spec, ratio=ratios.get(spec.dataset, 0.0)) for spec in specs]


def permuted(index: int, size: int, key: int) -> int:
    """Image of ``index`` under a pseudo-random permutation of ``range(size)`` chosen by ``key``.

    A Feistel network over the smallest even number of bits that holds ``size``, walked along its
    cycle until it lands inside; at most four steps on average.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (_scramble(right + (round_number << 48) + key) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


_FEISTEL_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


def _scramble(value: int) -> int:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _key(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
