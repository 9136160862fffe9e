"""Speech codes precomputed for training: Parquet shards, looked up by path, keyed by codec and content.

A cache folder holds one folder per codec, ``KIND-FINGERPRINT``, with ``codec.json`` and shards
``tokens-*.parquet`` of

====== ===============================================================
path   relative to the data root if the file is below it, else absolute
content BLAKE2b-128 of the file's bytes
size   of the file in bytes
seconds of speech
codes  list of int32
====== ===============================================================

Shards are written atomically. Readers map the shards through ``datasets`` and find a path by binary
search in a sorted, memory-mapped array of path hashes: 16 bytes per clip, shared by all workers of a
machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from filelock import FileLock

from vita_audio.audio.archives import read_file
from vita_audio.data.faults import NOT_WRITABLE, MachineError, first_line, machine_fault
from vita_audio.data.sources import map_parquet
from vita_audio.files import whole_file, write_json

logger = logging.getLogger(__name__)

CODEC_FILE = "codec.json"
_SHARD_PATTERN = "tokens-*.parquet"
_FEATURES = datasets.Features(
    {
        "path": datasets.Value("string"),
        "content": datasets.Value("string"),
        "size": datasets.Value("int64"),
        "seconds": datasets.Value("float32"),
        "codes": datasets.List(datasets.Value("int32")),
    }
)


class TokenCacheError(ValueError):
    """A cache that cannot be used. The message names the folder and what to do."""


@dataclass(frozen=True)
class CodecIdentity:
    """Identifies the codec that made a cache's codes."""

    kind: str
    fingerprint: str
    codebook_size: int

    @property
    def folder_name(self) -> str:
        return f"{self.kind}-{self.fingerprint}"


@dataclass(frozen=True)
class CachedClip:
    """The codes of one file, and the fields that identify it."""

    path: str
    content: str
    size: int
    seconds: float
    codes: list[int]


def audio_key(path: str | Path, data_root: str | Path) -> str:
    """The name of a file in a cache: relative to the data root if possible, so the data can be moved."""
    absolute, root = os.path.abspath(path), os.path.abspath(data_root)
    return os.path.relpath(absolute, root) if absolute.startswith(root + os.sep) else absolute


def content_hash(path: str | Path) -> str:
    """A digest of a file's bytes, in hexadecimal."""
    return hashlib.blake2b(read_file(path), digest_size=16).hexdigest()


def discrete_kind(kind: str) -> str:
    """The codec that makes the codes of a kind: the kind itself, or the part after ``sensevoice_``."""
    return kind.removeprefix("sensevoice_")


def write_shard(folder: Path, name: str, clips: Sequence[CachedClip]) -> Path:
    """Write ``tokens-NAME.parquet`` atomically."""
    columns = {field: [getattr(clip, field) for clip in clips] for field in _FEATURES}
    path = folder / f"tokens-{name}.parquet"
    with whole_file(path) as temporary:
        datasets.Dataset.from_dict(columns, features=_FEATURES).to_parquet(temporary)
    return path


def write_identity(folder: Path, identity: CodecIdentity) -> None:
    """Write ``codec.json``, which names the codec that made a folder's codes."""
    write_json(folder / CODEC_FILE, asdict(identity))


def identities(folder: str | Path) -> Iterator[tuple[Path, CodecIdentity]]:
    """The codecs with codes in a cache folder, or in the folder of one codec itself.

    Raises:
        TokenCacheError: a ``codec.json`` is damaged.
    """
    folder = Path(folder)
    for file in sorted([folder / CODEC_FILE, *folder.glob(f"*/{CODEC_FILE}")]):
        if file.is_file():
            try:
                identity = CodecIdentity(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise TokenCacheError(
                    f"{file}: does not name a codec ({error}); delete its folder and run tools/tokenize_audio.py"
                ) from error
            yield file.parent, identity


class TokenCache:
    """The codes of one codec, by path. Picklable; workers share its memory maps.

    Args:
        folder: a ``KIND-FINGERPRINT`` folder.
        arrow_cache: folder for the Arrow copy of the shards that ``datasets`` makes; defaults to HF_DATASETS_CACHE.

    Attributes:
        identity: the codec.
    """

    def __init__(self, folder: Path, arrow_cache: str | None = None) -> None:
        self.folder = folder
        self.identity = dict(identities(folder))[folder]
        shards = [str(shard) for shard in readable_shards(folder)]
        self._shards = _shards_key(shards)
        try:
            self._clips = (
                map_parquet(shards, arrow_cache)
                if shards
                else datasets.Dataset.from_dict({name: [] for name in _FEATURES}, features=_FEATURES)
            )
            self._index_file = _find_or_build_index(folder, shards, self._clips, arrow_cache)
        except (OSError, datasets.exceptions.DatasetGenerationError) as error:
            problem = machine_fault(error) or first_line(error)
            raise TokenCacheError(
                f"{folder}: cannot be opened because this machine failed: {problem}; free some space, and make this "
                "folder and HF_DATASETS_CACHE writable"
            ) from error
        self._index: np.ndarray | None = None

    @classmethod
    def find(
        cls, cache: str | Path, kind: str, fingerprint: str | None = None, arrow_cache: str | None = None
    ) -> TokenCache:
        """Open a codec's part of a cache.

        Args:
            cache: the cache folder, or a ``KIND-FINGERPRINT`` folder.
            kind: of the codec; ``sensevoice_X`` uses the codes of ``X``.
            fingerprint: needed if the cache holds codes of several codecs of this kind.

        Raises:
            TokenCacheError: no part or several parts match, or the part cannot be opened.
        """
        wanted = discrete_kind(kind)
        found = [
            (folder, identity)
            for folder, identity in identities(cache)
            if identity.kind == wanted and fingerprint in (None, identity.fingerprint)
        ]
        if len(found) != 1:
            have = ", ".join(identity.folder_name for _, identity in identities(cache)) or "nothing"
            problem = "no codes" if not found else "codes of several codecs"
            which = f" and fingerprint {fingerprint}" if fingerprint else ""
            raise TokenCacheError(
                f"{cache}: {problem} of kind {wanted!r}{which} (it holds {have}); "
                + ("run tools/tokenize_audio.py" if not found else "give the folder of one of them")
            )
        return cls(found[0][0], arrow_cache)

    def __len__(self) -> int:
        """Clips in the cache; one that was encoded twice counts twice."""
        return len(self._clips)

    @property
    def fingerprint(self) -> str:
        """A short description: the codec, the number of clips, and a digest of the shards."""
        return f"{self.identity.folder_name} of {len(self)} clips (shards {self._shards})"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_index": None}  # reopen the map instead of copying it

    def find_clip(self, key: str) -> CachedClip | None:
        """The clip for a path key (see :func:`audio_key`); None if it is not in the cache."""
        if self._index is None:
            self._index = np.load(self._index_file, mmap_mode="r")
        wanted = path_hash(key)
        hashes, rows = self._index
        at = int(np.searchsorted(hashes, wanted))
        newest = None
        while at < len(hashes) and hashes[at] == wanted:
            clip = self._clips[int(rows[at])]
            if clip["path"] == key:  # two paths may share a hash
                newest = CachedClip(**clip)
            at += 1
        return newest


def cached_sizes(folder: Path) -> dict[str, int]:
    """Every path key in a codec's folder, with the file size at the time of encoding."""
    sizes: dict[str, int] = {}
    for shard in readable_shards(folder):
        columns = pyarrow.parquet.read_table(shard, columns=["path", "size"]).to_pydict()
        sizes.update(zip(columns["path"], columns["size"], strict=True))
    return sizes


def readable_shards(folder: Path) -> Iterator[Path]:
    """The shards that can be opened. A damaged one is reported and skipped: its clips are encoded on demand.

    Raises:
        MachineError: the disk failed.
    """
    for shard in sorted(folder.glob(_SHARD_PATTERN)):
        try:
            pyarrow.parquet.ParquetFile(shard).close()
            yield shard
        except Exception as error:
            if (fault := machine_fault(error)) is not None:
                raise MachineError(f"{shard}: cannot be read: {fault}") from error
            logger.warning("%s: skipped a damaged token shard: %s", shard, error)


def _find_or_build_index(
    folder: Path, shards: list[str], clips: datasets.Dataset, arrow_cache: str | None
) -> Path:
    """Sorted path hashes with row numbers, shape (2, clips) uint64, as a file next to the shards.

    If that folder is read-only, the index is stored in the Arrow cache, which has to be writable anyway.

    Raises:
        OSError: neither can be written.
    """
    key = _shards_key(shards)
    own_name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=8).hexdigest()
    elsewhere = Path(arrow_cache or datasets.config.HF_DATASETS_CACHE)
    targets = (folder / f"index-{key}.npy", elsewhere / f"token-index-{own_name}-{key}.npy")
    for target in targets:
        if _is_index(target, len(clips)):
            return target
    try:
        _build_index(targets[0], clips)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        _build_index(targets[1], clips)
        return targets[1]
    return targets[0]


def _is_index(file: Path, clips: int) -> bool:
    """Whether a file is an index of so many clips; a damaged one is built again."""
    try:
        index = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return index.shape == (2, clips) and index.dtype == np.uint64


def _build_index(target: Path, clips: datasets.Dataset) -> None:
    with FileLock(target.parent / ".index.lock"):
        if _is_index(target, len(clips)):  # another process built it meanwhile
            return
        hashes = np.fromiter(
            (
                path_hash(path)
                for batch in clips.select_columns("path").iter(10_000)
                for path in batch["path"]
            ),
            dtype=np.uint64,
            count=len(clips),
        )
        order = np.argsort(hashes, kind="stable").astype(np.uint64)
        with whole_file(target) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack([hashes[order.astype(np.int64)], order]))


def _shards_key(shards: Sequence[str]) -> str:
    names = "\n".join(f"{Path(shard).name}:{os.path.getsize(shard)}" for shard in shards)
    return hashlib.blake2b(names.encode(), digest_size=8).hexdigest()


def path_hash(key: str) -> np.uint64:
    """A number for a path key, the same in every process (Python's own hash is not)."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
