"""What tests of the evaluation share.

* ``miniature``: the public layout of every benchmark, two or three items each, laid out as their publishers do.
* ``tiny_flags``: the command line that scores the tiny model.
* ``whisper``, ``sensevoice``, ``released``: small untrained networks in the layouts of the recognisers and of the
  speaker embedding.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from miniatures.files import clip, parquet, tar, wenetspeech_part, write

# The first is a phrase that is said twice, which the cleaning of training data rejects.
ENGLISH = ["THE RIVER THE RIVER", "a blue key lies here"]
CHINESE = ["今天天气很好", "他在书店里工作"]


def audio(seed: int, kind: str = "wav") -> dict:
    """An audio column of ``datasets``."""
    return {"bytes": clip(seed, kind), "path": f"{seed}.{kind}"}


def llama_questions(source: Path) -> None:
    rows = [
        {"question": "What colour is the sky?", "answer": "blue", "audio": audio(1)},
        {"question": "Who sings at night?", "answer": "nightingale", "audio": audio(2)},
    ]
    parquet(source / "data" / "test-00000-of-00001.parquet", rows)


def trivia_qa(source: Path) -> None:
    def answer(*aliases: str) -> dict:
        return {"aliases": list(aliases), "value": aliases[0], "normalized_value": aliases[0].lower()}

    rows = [
        {
            "question": "q",
            "question_id": "tc_2",
            "answer": answer("Sinclair Lewis", "Lewis"),
            "audio": audio(1),
        },
        {"question": "r", "question_id": "tc_33", "answer": answer("Judi Dench"), "audio": audio(2)},
    ]
    parquet(source / "rc.wikipedia" / "validation-00000-of-00002.parquet", rows[:1])
    parquet(source / "rc.wikipedia" / "validation-00001-of-00002.parquet", rows[1:])


def web_questions(source: Path) -> None:
    rows = [
        {"url": "u", "question": "q", "answers": ["Jazmyn Bieber", "Jaxon Bieber"], "audio": audio(1)},
        {"url": "v", "question": "r", "answers": ["Padmé Amidala"], "audio": audio(2)},
    ]
    parquet(source / "data" / "test-00000-of-00001.parquet", rows)


def librispeech(source: Path) -> None:
    for part in ("clean", "other"):
        for split in ("validation", "test"):
            rows = [
                {
                    "file": f"{number}.flac", "audio": audio(number, "flac"), "text": text, "speaker_id": 61,
                    "chapter_id": 7, "id": f"61-7-{split}-{number}",
                }
                for number, text in enumerate(ENGLISH)
            ]  # fmt: skip
            parquet(source / part / f"{split}-00000-of-00001.parquet", rows)


def libritts(source: Path) -> None:
    rows = [
        {
            "audio": audio(number), "text_normalized": text, "text_original": text, "speaker_id": "61",
            "path": "p", "chapter_id": "7", "id": f"61_7_{number}",
        }
        for number, text in enumerate(ENGLISH)
    ]  # fmt: skip
    parquet(source / "clean" / "test.clean-00000-of-00001.parquet", rows)


def wenetspeech(source: Path) -> None:
    for split in ("NET", "MEETING"):
        ids = [f"TEST_{split}_Y000_S0000{number}" for number in range(2)]
        wenetspeech_part(source / "data", f"cuts_TEST_{split}.00000000", ids, CHINESE, [clip(0), clip(1)])


def aishell(source: Path) -> None:
    transcript = ""
    for part, speaker in (("train", "S0002"), ("dev", "S0724"), ("test", "S0764")):
        for number, text in enumerate(CHINESE):
            name = f"BAC009{speaker}W012{number}"
            write(source / f"data_aishell/wav/{part}/{speaker}/{name}.wav", clip(number))
            transcript += f"{name} {' '.join(text)}\n"
    write(source / "data_aishell/transcript/aishell_transcript_v0.8.txt", transcript)


def fleurs(source: Path) -> None:
    for language, texts in (("cmn_hans_cn", CHINESE), ("en_us", ENGLISH)):
        # One sentence has two readers, as there.
        rows = [
            f"{1900 + number}\t10{number}{reader}.wav\t{text}。\t{text}\t{' | '.join(text)} |\t16000\tFEMALE\n"
            for number, text in enumerate(texts)
            for reader in range(2 - number)
        ]
        write(source / "data" / language / "test.tsv", "".join(rows))
        members = {f"test/{row.split(chr(9))[1]}": clip(place) for place, row in enumerate(rows)}
        tar(source / "data" / language / "audio" / "test.tar.gz", members, "w:gz")


def seed_tts_files() -> dict[str, bytes | str]:
    """Members of ``seedtts_testset.tar``."""
    files: dict[str, bytes | str] = {}
    for language, lists, texts in (
        ("zh", ("meta", "hardcase"), CHINESE),
        ("en", ("meta",), ENGLISH),
    ):
        for name in lists:
            files[f"seedtts_testset/{language}/{name}.lst"] = "".join(
                f"{name}-{number}|prompt|prompt-wavs/p{number}.wav|{text}"
                + (f"|wavs/{name}-{number}.wav" if name == "meta" else "")
                + "\n"
                for number, text in enumerate(texts)
            )
            if name == "meta":
                for number in range(2):
                    files[f"seedtts_testset/{language}/wavs/meta-{number}.wav"] = clip(number + 5)
        for number in range(2):
            files[f"seedtts_testset/{language}/prompt-wavs/p{number}.wav"] = clip(number)
    return files


def seed_tts(source: Path) -> None:
    for name, content in seed_tts_files().items():
        write(source / name, content)


_MINIATURES: dict[str, tuple[Callable[[Path], None], int]] = {
    "llama-questions": (llama_questions, 2),
    "trivia-qa": (trivia_qa, 2),
    "web-questions": (web_questions, 2),
    "librispeech-dev-clean": (librispeech, 2),
    "librispeech-dev-other": (librispeech, 2),
    "librispeech-test-clean": (librispeech, 2),
    "librispeech-test-other": (librispeech, 2),
    "wenetspeech-net": (wenetspeech, 2),
    "wenetspeech-meeting": (wenetspeech, 2),
    "aishell-1": (aishell, 2),
    "fleurs-zh": (fleurs, 3),
    "fleurs-en": (fleurs, 3),
    "libritts-test-clean": (libritts, 2),
    "seed-tts-zh": (seed_tts, 2),
    "seed-tts-en": (seed_tts, 2),
    "seed-tts-hard": (seed_tts, 2),
}
"""The miniature of each benchmark's SOURCE, and its number of items."""


@pytest.fixture
def miniature(tmp_path) -> Callable[[str], Path]:
    """Makes the SOURCE of a benchmark, as its publisher lays it out."""

    def make(name: str) -> Path:
        folder = tmp_path / "source"
        _MINIATURES[name][0](folder)
        return folder

    return make


@pytest.fixture
def counts() -> dict[str, int]:
    """Items of each miniature."""
    return {name: count for name, (_, count) in _MINIATURES.items()}


@pytest.fixture
def seed_tts_archive(tmp_path) -> Path:
    """``seedtts_testset.tar``."""
    path = tmp_path / "seedtts_testset.tar"
    tar(path, seed_tts_files())
    return path


@pytest.fixture(scope="session")
def whisper(tmp_path_factory) -> str:
    """A Whisper of the real architecture with random weights and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("whisper")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: id_ for id_, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    fast = WhisperTokenizerFast(
        tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[0], pad_token=specials[0]
    )
    fast.add_special_tokens({"additional_special_tokens": specials[1:]})
    fast.save_pretrained(folder)
    end, start, english, transcribe, no_timestamps = fast.convert_tokens_to_ids(specials)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(fast), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=80, bos_token_id=end,
        eos_token_id=end, pad_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end, eos_token_id=end, pad_token_id=end, decoder_start_token_id=start, max_length=12,
        is_multilingual=True, lang_to_id={"<|en|>": english}, task_to_id={"transcribe": transcribe},
        no_timestamps_token_id=no_timestamps,
    )  # fmt: skip
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sensevoice(tmp_path) -> Path:
    """The golden encoder with a vocabulary of its size."""
    folder = tmp_path / "sensevoice"
    folder.mkdir()
    goldens = Path(__file__).parents[1] / "goldens" / "sensevoice"
    shutil.copy(goldens / "encoder_config.json", folder / "config.json")
    shutil.copy(goldens / "encoder_weights.safetensors", folder / "model.safetensors")
    shutil.copy(goldens / "am.mvn", folder)
    pieces = ["<blank>", "<s>", "</s>", "<|en|>", *(f"\u2581w{number}" for number in range(20))]
    (folder / "tokens.json").write_text(json.dumps(pieces))
    return folder


GOLDEN = Path(__file__).parent / "goldens" / "wavlm_speaker.json"
"""Shapes of a small network in the layout of wavlm_large_finetune.pth, and the embeddings that WavLM's first release
with the published ECAPA-TDNN computes with the weights below."""


def small_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The weights behind the golden numbers."""
    weights = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(1)
        elif name.endswith(("running_var", "weight_g", "grep_a")):
            weights[name] = 1 + 0.2 * noise.abs()
        elif name.endswith("norm.weight") or (".bn" in name and name.endswith("weight")):
            weights[name] = 1 + 0.2 * noise
        else:
            weights[name] = noise / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else 4)
    return weights


@pytest.fixture(scope="session")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="session")
def released(golden, tmp_path_factory) -> Path:
    """A file in the released layout, with what training left in it."""
    path = tmp_path_factory.mktemp("wavlm") / "wavlm_large_finetune.pth"
    weights = small_weights(golden["shapes"]) | {"loss_calculator.projection.weight": torch.ones(2, 2)}
    torch.save({"model": weights}, path)
    return path


@pytest.fixture
def tiny_flags(tiny_world, tmp_path) -> Callable[..., list[str]]:
    """Flags that score the tiny model, in a mode of its own; more may follow."""
    grammar = tmp_path / "words.gram"
    grammar.write_text("#JSGF V1.0;\ngrammar words;\npublic <words> = ( river | blue | quiet )+;\n")

    def flags(*more: str, mode: str = "") -> list[str]:
        common = [
            "--checkpoints", f"tiny={tiny_world.model_dir}{mode}", "--audio_tokenizer_type", "mel_vq",
            "--audio_tokenizer_path", tiny_world.codec_dir, "--tts", tiny_world.data_dir / "tts.jsonl",
            "--sqa", tiny_world.data_dir / "sqa.jsonl", "--grammar", grammar, "--transcriber_processes", 0,
            "--system_prompt", "none", "--device", "cpu", "--output_dir", tmp_path / "out",
        ]  # fmt: skip
        return [*map(str, common), *more]

    return flags
