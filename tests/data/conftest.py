"""Shared pieces of the data tests: golden files, golden tokenizers and codec, small mixes on disk."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vita_audio.audio import AudioError

_FOLDER = Path(__file__).parents[1] / "goldens" / "data"


class _GoldenCodec:
    """Returns the codes and features that the golden files were made with."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.codes = json.loads((_FOLDER / "preprocess" / "audio_tokens.json").read_text())
        self.matrices = load_file(_FOLDER / "preprocess" / "audio_features.safetensors")
        self.encoded: list[str] = []

    def encode(self, audio: str) -> list[int]:
        self.encoded.append(audio)
        if audio not in self.codes:
            raise AudioError(f"{audio}: no such audio file", "missing")
        return self.codes[audio]

    def features(self, audio: str):
        if audio not in self.matrices:
            raise AudioError(f"{audio}: no such audio file", "missing")
        return self.matrices[audio]


class _Goldens:
    """The golden files of the data specification."""

    folder = _FOLDER
    codec = staticmethod(cache(_GoldenCodec))

    @staticmethod
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (_FOLDER / name).read_text(encoding="utf-8").splitlines()]

    @staticmethod
    @cache
    def tokenizer(kind: str):
        return AutoTokenizer.from_pretrained(_FOLDER / "tokenizer" / kind)


@pytest.fixture(scope="session")
def goldens() -> type[_Goldens]:
    return _Goldens


@pytest.fixture(scope="session")
def arrow_cache(tmp_path_factory) -> str:
    """Where ``datasets`` keeps its copies, so that tests leave nothing behind."""
    return str(tmp_path_factory.mktemp("arrow"))


@pytest.fixture(scope="session")
def text_sample():
    def make(text: str, reply: str = "ok") -> dict:
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]}

    return make


@pytest.fixture(scope="session")
def write_lines():
    def write(path: Path, samples: list) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (sample if isinstance(sample, str) else json.dumps(sample) for sample in samples)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def row_hash():
    def digest(batch: dict) -> str:
        parts = [batch[name].numpy().tobytes() for name in ("input_ids", "labels", "position_ids")]
        parts += [
            part.numpy().tobytes() for name in ("audios", "audio_indices") for part in batch.get(name, [])
        ]
        return hashlib.sha1(b"".join(parts)).hexdigest()

    return digest
