"""Speech that is heard as features: from the mix to batches, with a real front end."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.audio.sensevoice import Frontend
from vita_audio.constants import CONTEXT_OF_AUDIO, IGNORE_INDEX
from vita_audio.data import CodecSpec, DataConfig, build_train_loader

CMVN = Path(__file__).parents[1] / "goldens" / "sensevoice" / "am.mvn"


@pytest.fixture(scope="module")
def speech(tmp_path_factory, write_lines):
    folder = tmp_path_factory.mktemp("heard")
    generator = np.random.default_rng(0)
    for index in range(6):
        soundfile.write(folder / f"{index}.wav", generator.standard_normal(6000 + 2000 * index) * 0.1, 16_000)
    MelVQTokenizer.fit(
        [str(folder / f"{index}.wav") for index in range(6)], MelVQConfig(codebook_size=8), epochs=1
    ).save_pretrained(folder / "codec")
    heard = [
        {
            "messages": [
                {"role": "user", "content": f"{index} " + "<|audio|> " * (1 + index % 2)},
                {"role": "assistant", "content": "Yes.\n<|audio|>" if index % 3 else "No."},
            ],
            "audios": [f"{index}.wav"] * (1 + index % 2 + bool(index % 3)),
        }
        for index in range(6)
    ]
    write_lines(folder / "data.jsonl", heard)
    write_lines(folder / "mix.yaml", ["dataset: {heard: {data_paths: [data.jsonl]}}"])
    return folder


@pytest.fixture
def open_loader(speech, goldens, arrow_cache):
    def open_loader(**options):
        return build_train_loader(
            DataConfig(speech / "mix.yaml", seq_length=160, open_rows=3, arrow_cache=arrow_cache, **options),
            goldens.tokenizer("sensevoice_glm4voice"),
            CodecSpec("sensevoice_mel_vq", str(speech / "codec"), frontend_path=str(CMVN.parent)),
        )

    return open_loader


def test_features_lie_on_their_placeholders_in_every_row(open_loader, goldens, speech):
    context = goldens.tokenizer("sensevoice_glm4voice").convert_tokens_to_ids(CONTEXT_OF_AUDIO)
    frontend = Frontend(CMVN.parent)
    known = [frontend(str(speech / f"{index}.wav")) for index in range(6)]
    for batch in islice(open_loader(num_workers=0, micro_batch_size=2), 10):
        placed = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        assert len(batch["audios"]) == len(batch["audio_indices"]) > 0
        for features, index in zip(batch["audios"], batch["audio_indices"], strict=True):
            assert any(torch.equal(features, one) for one in known)
            assert index.shape == (2, 1, len(features) + 4)
            assert not placed[index[0], index[1]].any(), "two audios on one place"
            placed[index[0], index[1]] = True
        assert torch.equal(placed, batch["input_ids"] == context)
        assert (batch["labels"][placed] == IGNORE_INDEX).all()


def test_a_resumed_loader_gives_the_same_features(open_loader, row_hash):
    expected = [row_hash(batch) for batch in islice(open_loader(num_workers=0), 14)]
    first = open_loader(num_workers=0)
    seen = [row_hash(batch) for batch in islice(first, 5)]
    second = open_loader(num_workers=0)
    second.load_state_dict(first.state_dict())
    assert seen + [row_hash(batch) for batch in islice(second, 9)] == expected
    assert len(set(expected)) > 8
