"""Shared pieces of the data tests."""

from __future__ import annotations

import hashlib

import pytest


@pytest.fixture(scope="session")
def arrow_cache(tmp_path_factory) -> str:
    """Where ``datasets`` keeps its copies, so that tests leave nothing behind."""
    return str(tmp_path_factory.mktemp("arrow"))


@pytest.fixture(scope="session")
def row_hash():
    def digest(batch: dict) -> str:
        parts = [batch[name].numpy().tobytes() for name in ("input_ids", "labels", "position_ids")]
        parts += [
            part.numpy().tobytes() for name in ("audios", "audio_indices") for part in batch.get(name, [])
        ]
        return hashlib.sha1(b"".join(parts)).hexdigest()

    return digest
