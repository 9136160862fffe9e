"""The recognisers behind :mod:`vita_audio.evaluation.transcribers`, each a :class:`Transcriber`.

All hear 16 kHz, transcribe deterministically, and say in one line what they lack.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from vita_audio.audio import load_audio, save_audio
from vita_audio.audio.sensevoice import Frontend, SenseVoiceEncoder
from vita_audio.audio.sensevoice.encoder import NUM_QUERY_FRAMES, query_rows
from vita_audio.evaluation.transcribers import RECOGNISER_RATE, Transcriber, Waveform


class PocketSphinxTranscriber(Transcriber):
    """CMU Sphinx with its US English acoustic model.

    Its noise models mistake short pauses for breaths, and its words match digital silence: unmodified,
    it inserts about 20% extra words in clean synthetic digits. Every clip is therefore normalised in loudness,
    padded with silence and mixed with faint fixed noise, and with a grammar, pauses may only be
    silence. This reduces the 20% to about 2%.

    Its acoustic model uses noise removal, whose noise estimate is part of the feature extraction and
    persists across clips. That part is rebuilt for every clip (about a millisecond), so a transcript
    does not depend on earlier clips.

    Args:
        grammar: JSGF file with one public rule; every word must be in CMU's dictionary.
    """

    def __init__(self, grammar: str | PathLike[str] | None = None):
        try:
            from pocketsphinx import Decoder
        except ImportError as error:
            raise ValueError(
                "pocketsphinx is not installed; run pip install -e '.[eval]' in the repository"
            ) from error
        generator = torch.Generator().manual_seed(0)
        self._noise = _NOISE_LEVEL * torch.randn(RECOGNISER_RATE, generator=generator)
        # "batch": cepstral means over the whole clip.
        settings = {"samprate": float(RECOGNISER_RATE), "cmn": "batch", "loglevel": "FATAL"}
        if grammar is None:
            self._decoder = Decoder(**settings)
            return
        if not Path(grammar).is_file():
            raise ValueError(f"{grammar}: no such grammar file")
        self._decoder = Decoder(lm=None, fillprob=1e-40, silprob=0.5, **settings)
        try:
            self._decoder.add_jsgf_file("grammar", str(grammar))
            self._decoder.activate_search("grammar")
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{grammar}: not a JSGF grammar with one public rule over words of CMU's dictionary"
            ) from error

    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        return [self._hear(*clip) for clip in clips]

    def _hear(self, waveform: torch.Tensor, rate: int) -> str:
        pcm = (self._prepare(waveform, rate).clamp(-1, 1) * 32767).to(torch.int16)
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw(pcm.numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return str(hypothesis.hypstr) if hypothesis else ""

    def _prepare(self, waveform: torch.Tensor, rate: int) -> torch.Tensor:
        waveform, _ = load_audio((waveform, rate), RECOGNISER_RATE)
        waveform = waveform * (_LOUDNESS / waveform.square().mean().sqrt().clamp(min=1e-4))
        waveform = torch.nn.functional.pad(waveform, (_RIM_SAMPLES, _RIM_SAMPLES))
        repeats = -(-len(waveform) // len(self._noise))
        return waveform + self._noise.repeat(repeats)[: len(waveform)]


_LOUDNESS = 0.12  # root mean square
_NOISE_LEVEL = 10 ** (-50 / 20)  # -50 dB
_RIM_SAMPLES = RECOGNISER_RATE // 10
_SETTINGS = "every clip afresh"
"""Changed whenever this file processes clips differently, so older scores are not reused."""


class WhisperTranscriber(Transcriber):
    """Whisper through transformers' speech-recognition pipeline; clips over 30 s use its long-form mode.

    Args:
        model: folder or hub name.
        language: spoken language; None: detected.
    """

    batch_size = 16

    def __init__(self, model: str, language: str | None = None, device: str = "cpu"):
        from transformers import pipeline

        try:
            self._pipeline = pipeline(
                "automatic-speech-recognition",
                model=model,
                device=device,
                dtype=torch.float16 if device.startswith("cuda") else torch.float32,
            )
        except (OSError, ValueError) as error:
            # The pipeline's message holds a traceback for each class that it tried.
            cause = (str(error).split("See the original errors")[0].splitlines() or [""])[0]
            raise ValueError(
                f"{model}: cannot be opened as Whisper: {cause}; give --transcriber_path another folder"
            ) from error
        self._arguments = {"task": "transcribe"} | ({"language": language} if language else {})

    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        heard = [""] * len(clips)
        waveforms = [load_audio(clip, RECOGNISER_RATE)[0] for clip in clips]
        window = _WHISPER_WINDOW_SECONDS * RECOGNISER_RATE
        short = [index for index, waveform in enumerate(waveforms) if len(waveform) <= window]
        if short:
            texts = self._run([waveforms[index] for index in short], long_form=False)
            for index, text in zip(short, texts, strict=True):
                heard[index] = text
        for index, waveform in enumerate(waveforms):
            if len(waveform) > window:
                (heard[index],) = self._run([waveform], long_form=True)
        return heard

    def _run(self, waveforms: Sequence[torch.Tensor], long_form: bool) -> list[str]:
        run: Any = self._pipeline  # its types do not know lists
        results = run(
            [{"raw": waveform.numpy(), "sampling_rate": RECOGNISER_RATE} for waveform in waveforms],
            batch_size=len(waveforms),
            return_timestamps=long_form,  # needed for long-form mode
            generate_kwargs=self._arguments,
        )
        return [str(result["text"]).strip() for result in results]


_WHISPER_WINDOW_SECONDS = 30


class FasterWhisperTranscriber(Transcriber):
    """Whisper through CTranslate2, several times faster on a CPU (``pip install faster-whisper``).

    Args:
        model: folder of a converted model, or its size or hub name.
        language: spoken language; None: detected.
    """

    def __init__(self, model: str, language: str | None = None, device: str = "cpu"):
        try:
            from faster_whisper import WhisperModel
        except ImportError as error:
            raise ValueError(
                "the faster-whisper transcriber needs its package; pip install faster-whisper"
            ) from error
        self._model = WhisperModel(model, device=device.partition(":")[0], compute_type="default")
        self._language = language

    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        heard = []
        for clip in clips:
            waveform, _ = load_audio(clip, RECOGNISER_RATE)
            segments, _ = self._model.transcribe(waveform.numpy(), language=self._language)
            heard.append("".join(segment.text for segment in segments).strip())
        return heard


class ParaformerTranscriber(Transcriber):
    """Paraformer through FunASR, which users install themselves.

    Args:
        model: folder or hub name.
    """

    def __init__(self, model: str, device: str = "cpu"):
        try:
            from funasr import AutoModel
        except ImportError as error:
            raise ValueError("the paraformer transcriber needs FunASR; pip install funasr") from error
        self._model = AutoModel(model=model, device=device, disable_update=True, disable_pbar=True)

    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        heard = []
        for clip in clips:
            waveform, rate = load_audio(clip, RECOGNISER_RATE)
            (result,) = self._model.generate(input=waveform.numpy(), fs=rate)
            heard.append(str(result["text"]).strip())
        return heard


class SenseVoiceTranscriber(Transcriber):
    """SenseVoice's encoder with its CTC layer, without FunASR.

    The most likely token of every frame, repeats and blanks removed (Graves et al., 2006). The first four frames
    name language, emotion, event and text form, and are not words.

    Args:
        model: folder with the weights, ``am.mvn``, and the vocabulary: FunASR's SentencePiece model
            (``*.bpe.model``) or ``tokens.json``, a list.
        language: ``zh``, ``en``, ``yue``, ``ja`` or ``ko``; None: detected.
    """

    def __init__(self, model: str | PathLike[str], language: str | None = None, device: str = "cpu"):
        try:
            self._encoder = SenseVoiceEncoder.from_pretrained(model).to(device)
            self._frontend = Frontend(model)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from error
        self._pieces = _read_pieces(Path(model))
        size = self._encoder.config.ctc_vocab_size
        if len(self._pieces) != size:
            raise ValueError(
                f"{model}: the vocabulary has {len(self._pieces)} pieces and the CTC layer {size}; they must be equal"
            )
        self._device = device
        self._queries = query_rows(language or "auto")

    @torch.inference_mode()
    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        heard = []
        for clip in clips:
            features = self._frontend(load_audio(clip, RECOGNISER_RATE))
            encoded, _ = self._encoder(features[None].to(self._device), query_ids=self._queries)
            ids = self._encoder.ctc_log_probs(encoded)[0, NUM_QUERY_FRAMES:].argmax(dim=-1)
            heard.append(self._words(ids.unique_consecutive().tolist()))
        return heard

    def _words(self, ids: Sequence[int]) -> str:
        pieces = [self._pieces[id_] for id_ in ids if id_ != _CTC_BLANK]
        text = "".join(piece for piece in pieces if not _TAG.fullmatch(piece))
        return text.replace("\u2581", " ").strip()


_CTC_BLANK = 0
_TAG = re.compile(r"<[^<>]*>")


def _read_pieces(folder: Path) -> list[str]:
    """SenseVoice's vocabulary, by id.

    Raises:
        ValueError: there is none.
    """
    models = sorted(folder.glob("*.bpe.model"))
    if models:
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(models[0]))
        return [processor.id_to_piece(id_) for id_ in range(processor.get_piece_size())]
    file = folder / "tokens.json"
    if not file.is_file():
        raise ValueError(f"{folder}: no *.bpe.model and no tokens.json; the recogniser needs its vocabulary")
    pieces = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise ValueError(f"{file}: must be a list of texts")
    return pieces


class CommandTranscriber(Transcriber):
    """Any program that prints the transcript of a WAV file.

    Args:
        command: the command line; ``{wav}`` is the file, 16 kHz and 16 bit.
    """

    def __init__(self, command: str):
        self._words = shlex.split(command)
        if not any("{wav}" in word for word in self._words):
            raise ValueError(f"command:{command}: name the clip's file with {{wav}}")

    def transcribe_batch(self, clips: Sequence[Waveform]) -> list[str]:
        return [self._run(clip) for clip in clips]

    def _run(self, clip: Waveform) -> str:
        with tempfile.TemporaryDirectory() as folder:
            wav = Path(folder) / "clip.wav"
            save_audio(wav, *load_audio(clip, RECOGNISER_RATE))
            words = [word.replace("{wav}", str(wav)) for word in self._words]
            result = subprocess.run(words, capture_output=True, text=True, check=False)
        if result.returncode:
            said = (result.stderr.strip().splitlines() or ["nothing"])[-1]
            raise RuntimeError(f"{self._words[0]} ended with status {result.returncode}: {said}")
        return " ".join(result.stdout.split())
