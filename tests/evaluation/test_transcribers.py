"""Recognisers behind one interface, alone and in several processes."""

from __future__ import annotations

import json
import random
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from vita_audio.audio import save_audio
from vita_audio.evaluation.recognisers import (
    PocketSphinxTranscriber,
    SenseVoiceTranscriber,
    WhisperTranscriber,
)
from vita_audio.evaluation.transcribers import TranscriberConfig, TranscriberPool

GRAMMAR = "#JSGF V1.0;\ngrammar digits;\npublic <digits> = ( zero | one | two | three | four )+;\n"


@pytest.fixture
def grammar(tmp_path):
    path = tmp_path / "digits.gram"
    path.write_text(GRAMMAR)
    return str(path)


@pytest.fixture(scope="module")
def clips() -> list[tuple[torch.Tensor, int]]:
    """Spoken digits, some of them in noise."""
    folder = next((Path(__file__).parents[2] / "tools").rglob("espeak.py"))
    espeak = runpy.run_path(str(folder), run_name="espeak")
    try:
        synthesiser = espeak["open_synthesiser"]()
    except RuntimeError as error:
        pytest.skip(str(error))
    made = []
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        digits = torch.randint(5, (4,), generator=generator).tolist()
        text = " ".join("zero one two three four".split()[digit] for digit in digits)
        voice = espeak["Voice"](("en-us+f2", "en-us+m3", "en-us", "en-us+klatt3")[number % 4])
        speech = torch.as_tensor(synthesiser.speak(text, voice))
        noise = (0.0, 0.05)[number % 2] * torch.randn(len(speech), generator=generator)
        made.append(((0.5 * speech / speech.abs().max() + noise).clamp(-1, 1), synthesiser.sample_rate))
    return made


def test_a_grammar_bounds_what_is_heard(grammar, clips):
    words = " ".join(PocketSphinxTranscriber(grammar).transcribe(*clip) for clip in clips[:2])
    assert words.strip()
    assert set(words.split()) <= {"zero", "one", "two", "three", "four"}


def test_a_clip_is_heard_alike_alone_and_after_others_in_any_order(grammar, clips):
    """Likelihoods are compared too: they show what words alone rarely do."""

    def hear(transcriber: PocketSphinxTranscriber, clip: tuple[torch.Tensor, int]) -> tuple[str, float]:
        words = transcriber.transcribe(*clip)
        return words, transcriber._decoder.hyp().score

    alone = [hear(PocketSphinxTranscriber(grammar), clip) for clip in clips]
    assert sum(bool(words) for words, _ in alone) == len(clips)
    used = PocketSphinxTranscriber(grammar)
    for seed in range(2):
        order = random.Random(seed).sample(range(len(clips)), len(clips))
        assert [hear(used, clips[index]) for index in order] == [alone[index] for index in order]


def test_processes_hear_what_one_hears_and_in_order(grammar, clips, tmp_path):
    files = []
    for number, (speech, rate) in enumerate(clips[:4]):
        files.append(str(tmp_path / f"{number}.wav"))
        save_audio(files[-1], speech, rate)
    config = TranscriberConfig(grammar=grammar)
    with TranscriberPool(config, processes=0) as alone, TranscriberPool(config, processes=2) as pool:
        assert list(pool.transcribe(files)) == list(alone.transcribe(files))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TranscriberConfig(name="ears"), "unknown transcriber 'ears'"),
        (TranscriberConfig(grammar="nowhere.gram"), "nowhere.gram: no such grammar file"),
        (TranscriberConfig(name="paraformer"), "pip install funasr"),
    ],
)
def test_what_cannot_be_opened_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        config.open()


def test_a_grammar_with_unknown_words_is_refused(tmp_path):
    path = tmp_path / "bad.gram"
    path.write_text(GRAMMAR.replace("zero", "zzyzzk"))
    with pytest.raises(ValueError, match=r"bad\.gram"):
        PocketSphinxTranscriber(path)


def test_a_worker_says_why_it_cannot_listen(tmp_path):
    save_audio(tmp_path / "a.wav", torch.zeros(16_000), 16_000)
    with TranscriberPool(TranscriberConfig(grammar="nowhere.gram"), processes=1) as pool:
        future = pool.submit(str(tmp_path / "a.wav"))
        with pytest.raises(ValueError, match=r"nowhere\.gram"):
            future.result(timeout=120)


# -- neural recognisers, small and untrained, through their real interfaces ------------------------------------


def noise(seed: int, seconds: float = 1.0) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(int(16_000 * seconds), generator=generator), 16_000


def test_whisper_hears_the_same_in_batches_and_alone(whisper, monkeypatch):
    config = TranscriberConfig("whisper", whisper, language="en")
    config.check()
    clips = [noise(seed, 0.5 + 0.3 * seed) for seed in range(3)]
    with TranscriberPool(config, processes=0) as pool:
        run, batches = WhisperTranscriber._run, []
        monkeypatch.setattr(
            WhisperTranscriber,
            "_run",
            lambda self, waveforms, **options: (
                batches.append(len(waveforms)) or run(self, waveforms, **options)
            ),
        )
        together = list(pool.transcribe(clips))
        alone = [config.open().transcribe(*clip) for clip in clips]
    assert together == alone
    assert batches == [3, 1, 1, 1]
    assert all(together)


def test_missing_whisper_weights_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds Whisper's config\.json but no weights"):
        TranscriberConfig("whisper", str(tmp_path)).open()


def test_sensevoice_reads_its_ctc_layer_greedily(sensevoice):
    """Against the golden log probabilities: the frames after the four queries, without repeats, blanks and tags."""
    recogniser = TranscriberConfig("sensevoice", str(sensevoice)).open()
    with np.load(Path(__file__).parents[1] / "goldens" / "sensevoice" / "encoder.npz") as golden:
        features = torch.from_numpy(golden["feats_0"])
        best = golden["ctc_log_probs"][0, 4 : 4 + len(features)].argmax(axis=-1)
    recogniser._frontend = lambda clip: features
    pieces = json.loads((sensevoice / "tokens.json").read_text())
    kept = [id_ for place, id_ in enumerate(best) if place == 0 or id_ != best[place - 1]]
    words = "".join(pieces[id_] for id_ in kept if id_ > 3).replace("\u2581", " ").strip()
    assert words
    assert recogniser.transcribe(torch.zeros(16_000), 16_000) == words


def test_sensevoice_hears_clips_and_names_what_it_lacks(sensevoice):
    config = TranscriberConfig("sensevoice", str(sensevoice), language="en")
    config.check()
    first = config.fingerprint()
    with TranscriberPool(config, processes=0) as pool:
        said = list(pool.transcribe([noise(1), noise(2)]))
    assert all(set(word) <= set("w0123456789") for text in said for word in text.split())
    (sensevoice / "tokens.json").write_text('["a"]')
    assert config.fingerprint() != first
    with pytest.raises(ValueError, match="the vocabulary has 1 pieces and the CTC layer 24"):
        config.open()
    (sensevoice / "tokens.json").unlink()
    with pytest.raises(ValueError, match="the recogniser needs its vocabulary"):
        config.open()
    (sensevoice / "am.mvn").unlink()
    with pytest.raises(ValueError, match=r"not a folder with SenseVoice's weights and am\.mvn; download it"):
        config.check()


def test_sensevoice_reads_the_released_vocabulary(sensevoice, tmp_path):
    """FunASR's file is a SentencePiece model."""
    import sentencepiece

    (tmp_path / "text.txt").write_text("the river is quiet\na blue key lies here\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(sensevoice / "spectok.bpe"), vocab_size=24,
        model_type="bpe", minloglevel=2, bos_id=1, eos_id=2, unk_id=0, character_coverage=1.0,
    )  # fmt: skip
    (sensevoice / "tokens.json").unlink()
    recogniser = TranscriberConfig("sensevoice", str(sensevoice)).open()
    assert isinstance(recogniser, SenseVoiceTranscriber)
    assert recogniser._pieces[1:3] == ["<s>", "</s>"]
    assert recogniser.transcribe(*noise(1)) is not None


def test_a_command_prints_the_transcript(tmp_path):
    script = "import sys, wave; w = wave.open(sys.argv[1]); print('frames', w.getnframes(), w.getframerate())"
    config = TranscriberConfig(f"command:{sys.executable} -c {shlex.quote(script)} {{wav}}")
    config.check()
    assert config.open().transcribe(torch.zeros(8_000), 8_000) == "frames 16000 16000"
    with pytest.raises(ValueError, match=r"name the clip's file with \{wav\}"):
        TranscriberConfig("command:asr").check()


def test_a_command_that_fails_fails_its_clip_only(tmp_path):
    script = "import sys, wave; sys.exit('too long') if wave.open(sys.argv[1]).getnframes() > 9000 else print('ok')"
    config = TranscriberConfig(f"command:{sys.executable} -c {shlex.quote(script)} {{wav}}")
    with TranscriberPool(config, processes=0) as pool:
        short, long = pool.submit(noise(1, 0.5)), pool.submit(noise(1, 1.0))
        assert short.result() == "ok"
        with pytest.raises(RuntimeError, match="ended with status 1: too long"):
            long.result()


def test_faster_whisper_joins_its_segments(monkeypatch):
    """With a stand-in of its interface."""

    class WhisperModel:
        def __init__(self, model: str, device: str, compute_type: str):
            assert (model, device, compute_type) == ("large-v3", "cpu", "default")

        def transcribe(self, waveform: np.ndarray, language: str | None):
            assert (waveform.shape, waveform.dtype, language) == ((16_000,), np.float32, "en")
            return iter([SimpleNamespace(text=" one"), SimpleNamespace(text=" two")]), None

    config = TranscriberConfig("faster-whisper", language="en")
    with pytest.raises(ValueError, match="pip install faster-whisper"):
        config.check()
    module = ModuleType("faster_whisper")
    module.WhisperModel = WhisperModel
    module.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    assert config.open().transcribe(*noise(1)) == "one two"


def test_paraformer_is_asked_as_funasr_wants(monkeypatch):
    """With a stand-in of its interface."""

    class AutoModel:
        def __init__(self, model: str, **options: object):
            assert model == "paraformer-zh"

        def generate(self, input: np.ndarray, fs: int) -> list[dict]:
            assert (input.shape, fs) == ((16_000,), 16_000)
            return [{"text": " 你好 "}]

    module = ModuleType("funasr")
    module.AutoModel = AutoModel
    module.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "funasr", module)
    assert TranscriberConfig("paraformer").open().transcribe(*noise(1)) == "你好"
