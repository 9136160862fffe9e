"""A disk cache of SenseVoice features, so later epochs and stages need not recompute them.

``FOLDER/FRONTEND/ab/abcd….safetensors`` holds the features of one clip, float32 (frames, 560): about 38 kB for a
second of speech. FRONTEND is the fingerprint of the normalisation, the file name is a hash of the clip's path
relative to the data root. Files are added as clips are read, by any number of workers and
machines that share the folder, and are written atomically. An unwritable cache or a damaged file in it costs
only time.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vita_audio.files import whole_file

logger = logging.getLogger(__name__)


class FeatureCache:
    """Features of clips, by path.

    Args:
        folder: created when the first clip is written.
        frontend: fingerprint of the feature front end.
    """

    def __init__(self, folder: str | Path, frontend: str) -> None:
        self._folder = Path(folder) / frontend
        self._writable = True

    def find(self, key: str, size: int) -> torch.Tensor | None:
        """Features of a clip, (frames, feature_dim); None if they are missing, stale or damaged.

        Args:
            key: the clip's path, see :func:`vita_audio.data.token_cache.audio_key`.
            size: of the audio file in bytes; features of a file of another size are stale.
        """
        try:
            with safe_open(self._file(key), framework="pt") as stored:
                if stored.metadata() != {"path": key, "size": str(size)}:
                    return None
                return stored.get_tensor("features")
        except (OSError, SafetensorError):
            return None

    def put(self, key: str, size: int, features: torch.Tensor) -> None:
        """Store a clip's features. If the folder cannot be written, that is reported once and not retried."""
        if not self._writable:
            return
        try:
            with whole_file(self._file(key)) as temporary:
                save_file({"features": features.contiguous()}, temporary, {"path": key, "size": str(size)})
        except (OSError, SafetensorError) as error:
            self._writable = False
            logger.warning(
                "%s: cannot be written (%s); features will be recomputed each time", self._folder, error
            )

    def _file(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"
