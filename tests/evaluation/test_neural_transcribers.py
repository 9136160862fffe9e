"""Whisper, on a tiny model that names two tones in two languages, and Paraformer, with a stand-in for FunASR."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from vita_audio.audio import save_audio
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool

RATE = 16_000
WINDOW_SECONDS = 6  # of the tiny model; the released ones have 30
WORDS = {("low", "en"): "low", ("high", "en"): "high", ("low", "de"): "tief", ("high", "de"): "hoch"}
END, START, EN, DE, TRANSCRIBE, PREVIOUS, NO_TIMESTAMPS = (
    f"<|{name}|>"
    for name in ("endoftext", "startoftranscript", "en", "de", "transcribe", "startofprev", "notimestamps")
)


def tone(kind: str, seconds: float) -> torch.Tensor:
    time = torch.arange(round(seconds * RATE)) / RATE
    return 0.3 * torch.sin(2 * torch.pi * {"low": 300, "high": 2500}[kind] * time)


def whisper_tokenizer() -> WhisperTokenizer:
    """Bytes, Whisper's control tokens and its timestamps."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    control = (END, START, EN, DE, "<|translate|>", TRANSCRIBE, PREVIOUS, "<|nospeech|>", NO_TIMESTAMPS)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in control])
    tokenizer.add_tokens([f"<|{index * 0.02:.2f}|>" for index in range(50 * WINDOW_SECONDS + 1)])
    return tokenizer


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    """A folder like the released ones, trained for seconds on clips with and without timestamps."""
    folder = tmp_path_factory.mktemp("whisper")
    tokenizer = whisper_tokenizer()
    ids = tokenizer.get_vocab()
    extractor = WhisperFeatureExtractor(chunk_length=WINDOW_SECONDS)
    features, rows = [], []
    for (kind, language), word in WORDS.items():
        text, start = (
            tokenizer(word, add_special_tokens=False).input_ids,
            (START, f"<|{language}|>", TRANSCRIBE),
        )
        for seconds, before, after in ((2, NO_TIMESTAMPS, ()), (6, "<|0.00|>", ("<|6.00|>",))):
            clip = extractor(tone(kind, seconds).numpy(), sampling_rate=RATE, return_tensors="pt")
            features.append(clip.input_features[0])
            rows.append(
                torch.tensor(
                    [*(ids[name] for name in (*start, before)), *text, *(ids[name] for name in (*after, END))]
                )
            )
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=50 * WINDOW_SECONDS,
        decoder_start_token_id=ids[START],
        begin_suppress_tokens=None,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), ids[END]),
    )
    model = WhisperForConditionalGeneration(config)
    inputs = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in rows], True, ids[END])
    labels = torch.nn.utils.rnn.pad_sequence([row[1:] for row in rows], True, -100)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        model(input_features=torch.stack(features), decoder_input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    generation = model.generation_config
    generation.lang_to_id = {EN: ids[EN], DE: ids[DE]}
    generation.task_to_id = {"transcribe": ids[TRANSCRIBE]}
    generation.is_multilingual, generation.max_initial_timestamp_index = True, 50
    generation.no_timestamps_token_id, generation.prev_sot_token_id = ids[NO_TIMESTAMPS], ids[PREVIOUS]
    generation._from_model_config = False
    for part in (model, tokenizer, extractor):
        part.save_pretrained(folder)
    generation.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("language", ["en", "de"])
def test_whisper_transcribes_in_the_given_language(whisper, language):
    recogniser = TranscriberConfig("whisper", whisper, language=language).open()
    for kind in ("low", "high"):
        assert recogniser.transcribe(tone(kind, 2), RATE) == WORDS[kind, language]


def test_whisper_transcribes_clips_beyond_its_window_to_the_end(whisper):
    recogniser = TranscriberConfig("whisper", whisper, language="en").open()
    assert (
        recogniser.transcribe(torch.cat([tone("high", 18), tone("low", 18)]), RATE) == 3 * "high" + 3 * "low"
    )


def test_scores_depend_on_the_weights_and_the_language_of_whisper(whisper):
    english, german = (TranscriberConfig("whisper", whisper, language=language) for language in ("en", "de"))
    assert english.fingerprint() == TranscriberConfig("whisper", whisper, language="en").fingerprint()
    assert english.fingerprint() != german.fingerprint()
    assert english.describe() == f"whisper, {whisper}"


def test_a_folder_without_the_weights_of_whisper_is_refused_in_one_line(tmp_path, whisper):
    torn, foreign = (shutil.copytree(whisper, tmp_path / name) for name in ("torn", "foreign"))
    (torn / "model.safetensors").unlink()
    (foreign / "config.json").write_text("{}")
    for path, message in (
        (torn, "torn: holds Whisper's config.json but no weights; copy the complete folder"),
        (tmp_path / "nowhere", "give --transcriber_path a folder"),
        ("no/such model", "give --transcriber_path a folder"),
        ("-a--b/c", "give --transcriber_path a folder"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}$"):
            TranscriberConfig("whisper", str(path)).check()
    with pytest.raises(
        ValueError, match=r"^[^\n]*foreign: cannot be opened as Whisper: [^\n]*another folder$"
    ):
        TranscriberConfig("whisper", str(foreign)).open()


FUNASR = """
class AutoModel:
    def __init__(self, model, device, **options):
        self.model = model

    def generate(self, input, fs):
        return [{"text": f" {self.model} {len(input) / fs:.1f} s at {fs} Hz "}]
"""


def test_paraformer_gets_clips_at_its_own_rate(tmp_path, monkeypatch):
    (tmp_path / "funasr.py").write_text(FUNASR)
    spec = spec_from_file_location("funasr", tmp_path / "funasr.py")
    funasr = module_from_spec(spec)
    spec.loader.exec_module(funasr)
    monkeypatch.setitem(sys.modules, "funasr", funasr)
    with pytest.raises(ValueError, match=r"nowhere: no such folder; give one with Paraformer's weights$"):
        TranscriberConfig("paraformer", "nowhere").check()
    save_audio(tmp_path / "a.wav", torch.zeros(22_050), 44_100)
    with TranscriberPool(TranscriberConfig("paraformer"), processes=0) as pool:
        assert list(pool.transcribe([str(tmp_path / "a.wav")])) == ["paraformer-zh 0.5 s at 16000 Hz"]
