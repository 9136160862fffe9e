"""The model's speech as WAV files, and what a recogniser hears in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from vita_audio.audio import AudioTokenizer, save_audio
from vita_audio.evaluation.transcribers import TranscriberPool


class Listener:
    """Turns codes into WAV files and recognises them, in parallel with the caller.

    Identical codes are decoded and recognised once: codec and recognisers are deterministic, and stages that
    share a frozen language model give identical replies.
    """

    def __init__(self, codec: AudioTokenizer, pool: TranscriberPool):
        self._codec = codec
        self._pool = pool
        self._written: dict[str, Path] = {}
        self._heard: dict[str, Future[str]] = {}

    def hear(self, codes: Sequence[int], wav: Path) -> Future[str]:
        """Write the speech to ``wav`` and start recognising it."""
        key = hashlib.sha256(json.dumps(list(codes)).encode()).hexdigest()
        wav.parent.mkdir(parents=True, exist_ok=True)
        if key not in self._written:
            save_audio(wav, self._codec.decode(codes), self._codec.sample_rate)
            self._written[key] = wav
            self._heard[key] = self._pool.submit(str(wav))
        elif self._written[key] != wav:
            shutil.copyfile(self._written[key], wav)
        return self._heard[key]

    def hear_file(self, audio: str) -> Future[str]:
        """Start recognising a recording."""
        return self._pool.submit(audio)
