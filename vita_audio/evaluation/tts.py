"""Speech synthesis: what an independent recogniser hears in the model's speech (WER).

No model can sound clearer than its codec. So the same recogniser also hears each reference
recording after the codec alone (encode, decode): the codec's floor, beside which the model's
figure must be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vita_audio import distributed
from vita_audio.audio import AudioTokenizer
from vita_audio.chat import prompts
from vita_audio.evaluation.benchmark import (
    BenchmarkItem,
    Listener,
    Utterance,
    batched_replies,
    gather,
    spoken_utterances,
    wav_name,
)
from vita_audio.evaluation.metrics import corpus_error_rate, seed_tts_error_rate
from vita_audio.inference import GenerationOptions, SpeechPipeline


def run_tts(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    options: GenerationOptions,
    listener: Listener,
    folder: Path,
    batch_size: int = 32,
) -> list[Utterance]:
    """Speak every item and have it recognised; WAV files go to ``folder/wav/tts``."""
    replies = batched_replies(pipeline, items, options, batch_size, "TTS")
    return spoken_utterances(replies, listener, folder, "tts", requested_text)


def requested_text(item: BenchmarkItem) -> str:
    """The text that the last message asks to be read."""
    message = item.conversation.messages[-1]
    return prompts.requested_text(message) or message.text.strip()


def score_tts(
    utterances: Sequence[Utterance], normalise: Callable[[str], str] | None = None
) -> dict[str, float | int]:
    """``tts_wer`` counts utterances without speech as wholly deleted; ``tts_wer_answered`` leaves
    them out, as published scripts do (bug 17 of the data specification). Fractions.

    Args:
        normalise: applied to both sides; words without punctuation when absent.
    """
    result = _word_errors(utterances, normalise or plain_words)
    return {
        "tts_wer": result.rate,
        "tts_wer_answered": result.answered.rate,
        "tts_utterances": len(utterances),
        "tts_without_audio": len(result.missing),
        "tts_reference_words": result.counts.reference_tokens,
    }


def score_seed_tts(utterances: Sequence[Utterance], language: str) -> dict[str, float | int]:
    """Seed-TTS figure: the mean of the utterances' rates; one without speech counts as 1."""
    rates = [
        1.0
        if utterance.heard is None
        else seed_tts_error_rate(utterance.reference, utterance.heard, language).rate
        for utterance in utterances
    ]
    return {
        "seed_tts_wer": sum(rates) / len(rates),
        "tts_utterances": len(utterances),
        "tts_without_audio": sum(utterance.heard is None for utterance in utterances),
    }


def run_codec_floor(
    codec: AudioTokenizer, items: Sequence[BenchmarkItem], listener: Listener, folder: Path
) -> tuple[list[Utterance], list[Utterance]]:
    """Recognise the reference recordings, after the codec and as they are.

    Returns:
        Utterances of the resynthesised and of the natural speech; empty without recordings.
    """
    recorded = [item for item in items if item.reference_audio][
        distributed.rank() :: distributed.world_size()
    ]
    resynthesised, natural = [], []
    for item in recorded:
        wav = Path("wav") / "floor" / wav_name(item.id)
        heard = listener.hear(codec.encode(item.reference_audio), folder / wav)
        resynthesised.append((item, heard, wav.as_posix()))
        natural.append((item, listener.hear_file(item.reference_audio), item.reference_audio))

    def finish(started: list) -> list[Utterance]:
        return gather(
            [
                Utterance(item.id, requested_text(item), "", heard.result(), wav)
                for item, heard, wav in started
            ]
        )

    return finish(resynthesised), finish(natural)


def score_codec_floor(
    resynthesised: Sequence[Utterance],
    natural: Sequence[Utterance],
    normalise: Callable[[str], str] | None = None,
) -> dict[str, float | None]:
    """``tts_floor_wer`` after the codec and ``tts_natural_wer`` of the recordings themselves."""
    normalise = normalise or plain_words
    return {
        "tts_floor_wer": _word_errors(resynthesised, normalise).rate if resynthesised else None,
        "tts_natural_wer": _word_errors(natural, normalise).rate if natural else None,
    }


def plain_words(text: str) -> str:
    """Every run of other characters becomes one space (section 8.1, LibriTTS)."""
    return re.sub(r"\W+", " ", text).strip()


def _word_errors(utterances: Sequence[Utterance], normalise: Callable[[str], str]):
    return corpus_error_rate(
        {utterance.id: normalise(utterance.reference) for utterance in utterances},
        {
            utterance.id: None if utterance.heard is None else normalise(utterance.heard)
            for utterance in utterances
        },
    )
