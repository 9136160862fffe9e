"""Shared pieces of all tests.

* ``tiny_world``: a tiny model that speaks, trained for seconds on three samples, and a codec fitted on noise and tones.
* ``goldens``: files, tokenizers and codec of the data specification.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which other libraries do

from safetensors.torch import load_file
from transformers import AutoTokenizer

from vita_audio.audio import AudioError, AudioTokenizer, save_audio
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.data import build_example
from vita_audio.models import Qwen2MTPConfig, Qwen2MTPForCausalLM

_DATA_GOLDENS = Path(__file__).parent / "goldens" / "data"
TOKENIZER = _DATA_GOLDENS / "tokenizer" / "glm4voice"
CODES = 64  # speech tokens of that tokenizer
HEADS = 10
KNOWN_BY_HEART = 0.05  # loss of the backbone and of every head


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process is left with a long one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    """What a test ran may have set torch's threads; two processes with two each on two cores are 30 times slower."""
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(THREADS)


@dataclass(frozen=True)
class TinyWorld:
    """Folders of a model, its codec and the samples it knows by heart."""

    model_dir: Path
    codec_dir: Path
    data_dir: Path
    codec: AudioTokenizer
    samples: dict[str, dict]

    def audio(self, name: str) -> str:
        return str(self.data_dir / name)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> TinyWorld:
    root = tmp_path_factory.mktemp("tiny_world")
    data_dir, codec_dir, model_dir = root / "data", root / "codec", root / "model"
    data_dir.mkdir()
    for seed, (name, seconds) in enumerate({"question": 1.0, "answer": 1.9, "reading": 2.3}.items()):
        save_audio(data_dir / f"{name}.wav", _sound(seconds, seed), 16_000)
    noise = [(_sound(3.0, seed), 16_000) for seed in range(10, 14)]
    MelVQTokenizer.fit(noise, MelVQConfig(codebook_size=CODES), epochs=2).save_pretrained(codec_dir)
    codec = MelVQTokenizer.from_pretrained(codec_dir)

    samples = {
        "asr": _sample("Convert the speech to text.\n<|audio|>", "the blue key", ["question.wav"]),
        "tts": _sample("Convert the text to speech.\nthe quiet river runs", "<|audio|>", ["reading.wav"]),
        "sqa": _sample("<|audio|>", "blue\n<|audio|>", ["question.wav", "answer.wav"]),
    }
    for task, sample in samples.items():
        line = json.dumps({"id": f"{task}_1"} | sample)
        (data_dir / f"{task}.jsonl").write_text(line + "\n")

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(model_dir)
    absolute = [
        sample | {"audios": [str(data_dir / audio) for audio in sample["audios"]]}
        for sample in samples.values()
    ]
    model = _learn_by_heart([build_example(sample, tokenizer, codec) for sample in absolute])
    model.save_pretrained(model_dir)
    return TinyWorld(model_dir, codec_dir, data_dir, codec, samples)


def _sample(user: str, assistant: str, audios: list[str]) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages, "audios": audios}


def _sound(seconds: float, seed: int) -> torch.Tensor:
    """A warble in noise, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(int(16_000 * seconds)) / 16_000
    pitch = 200 + 150 * torch.rand(1, generator=generator) * torch.sin(2 * math.pi * (2 + seed % 3) * time)
    tone = torch.sin(2 * math.pi * torch.cumsum(pitch, 0) / 16_000)
    return 0.3 * tone + 0.05 * torch.randn(len(time), generator=generator)


def _learn_by_heart(examples: list) -> Qwen2MTPForCausalLM:
    torch.manual_seed(0)
    config = Qwen2MTPConfig(
        vocab_size=688,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1 + HEADS,
        num_nextn_predict_layers=HEADS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = Qwen2MTPForCausalLM(config)
    ids, positions, labels = [], [], []
    for example in examples:
        ids += example.input_ids
        positions += range(len(example.input_ids))
        labels += example.labels
    row = {"input_ids": ids, "position_ids": positions, "labels": labels}
    row = {name: torch.tensor([values]) for name, values in row.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        output = model(**row)
        if max(output.loss.item(), *map(float, output.mtp_losses)) < KNOWN_BY_HEART:
            return model.eval()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError("the tiny model did not learn its three samples")


class _GoldenCodec:
    """Returns the codes and features that the golden files were made with."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.codes = json.loads((_DATA_GOLDENS / "preprocess" / "audio_tokens.json").read_text())
        self.matrices = load_file(_DATA_GOLDENS / "preprocess" / "audio_features.safetensors")
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

    folder = _DATA_GOLDENS
    codec = staticmethod(cache(_GoldenCodec))

    @staticmethod
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (_DATA_GOLDENS / name).read_text(encoding="utf-8").splitlines()]

    @staticmethod
    @cache
    def tokenizer(kind: str):
        return AutoTokenizer.from_pretrained(_DATA_GOLDENS / "tokenizer" / kind)


@pytest.fixture(scope="session")
def goldens() -> type[_Goldens]:
    return _Goldens


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
