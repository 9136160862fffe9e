"""Speech synthesis: word error rate of the model's speech, by an independent recogniser.

No model can sound clearer than its codec. The same recogniser therefore also transcribes each reference recording,
unchanged and after the codec (encode, decode). The latter is the codec floor, the baseline for the model's figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from vita_audio.audio import AudioTokenizer
from vita_audio.chat import prompts
from vita_audio.distributed import rank, world_size
from vita_audio.evaluation.benchmarks import Bench, BenchmarkItem, Utterance, gather, read_test_set
from vita_audio.evaluation.metrics import CorpusErrors, corpus_error_rate
from vita_audio.evaluation.normalisers import Normaliser, normaliser, plain_words
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances


class Reading:
    """What all tasks of reading aloud share."""

    def is_as_trained(self, item: BenchmarkItem) -> bool:
        return is_reading_request(item)

    def run(self, bench: Bench, items: Sequence[BenchmarkItem]) -> list[Utterance]:
        """Synthesise and recognise every item."""
        return bench.spoken(items, requested_text)


@dataclass(frozen=True)
class SpeechSynthesis(Reading):
    """TTS.

    Attributes:
        text_normaliser: applied to both sides, see :data:`~vita_audio.evaluation.normalisers.NORMALISERS`.
    """

    text_normaliser: str = "words"
    name: str = "tts"
    title: str = "TTS"
    columns: tuple[Column, ...] = (
        Column("WER %", "tts_wer"),
        Column("codec floor %", "tts_floor_wer"),
        Column("natural %", "tts_natural_wer"),
    )
    speaks: bool = True
    samples: bool = True
    open_system: bool = False

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        return read_test_set(path, data_root, limit, check=check_text)

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """``tts_wer`` counts utterances without speech as wholly deleted; ``tts_wer_answered``
        excludes them, as the published scripts do (bug 17 of the data specification). Fractions."""
        result = self._word_errors(utterances)
        return {
            "tts_wer": result.rate,
            "tts_wer_answered": result.answered.rate if result.answered.reference_tokens else None,
            "tts_utterances": len(utterances),
            "tts_without_audio": len(result.missing),
            "tts_reference_words": result.counts.reference_tokens,
        }

    def score_recordings(self, resynthesised: Sequence[Utterance], natural: Sequence[Utterance]) -> Scores:
        """``tts_floor_wer`` of the recordings after the codec, and ``tts_natural_wer`` of the originals."""
        return {
            "tts_floor_wer": self._word_errors(resynthesised).rate if resynthesised else None,
            "tts_natural_wer": self._word_errors(natural).rate if natural else None,
        }

    def _word_errors(self, utterances: Sequence[Utterance]) -> CorpusErrors:
        need_utterances(utterances)
        normalise: Normaliser = normaliser(self.text_normaliser)
        return corpus_error_rate(
            {utterance.id: normalise(str(utterance.reference)) for utterance in utterances},
            {
                utterance.id: None if utterance.heard is None else normalise(utterance.heard)
                for utterance in utterances
            },
        )


def run_recordings(
    bench: Bench, codec: AudioTokenizer, items: Sequence[BenchmarkItem]
) -> tuple[list[Utterance], list[Utterance]]:
    """Recognise the reference recordings, after the codec and unchanged.

    Returns:
        Utterances of the resynthesised and of the natural speech; empty without recordings.
    """
    assert bench.listener is not None, "recognising recordings needs a listener"
    resynthesised: list[tuple[BenchmarkItem, Future[str], str]] = []
    natural: list[tuple[BenchmarkItem, Future[str], str]] = []
    recorded = [(item, item.reference_audio) for item in items if item.reference_audio is not None]
    for item, recording in recorded[rank() :: world_size()]:
        wav = bench.wav(item.id)
        resynthesised.append((item, bench.hear(codec.encode(recording), wav), wav.as_posix()))
        natural.append((item, bench.listener.hear_file(recording), recording))
    return _finish(resynthesised), _finish(natural)


def _finish(started: Sequence[tuple[BenchmarkItem, Future[str], str]]) -> list[Utterance]:
    return gather(
        [Utterance(item.id, requested_text(item), "", heard.result(), wav) for item, heard, wav in started]
    )


def requested_text(item: BenchmarkItem) -> str:
    """The text that the last message asks to be read aloud."""
    message = item.conversation.messages[-1]
    return prompts.requested_text(message) or message.text.strip()


def is_reading_request(item: BenchmarkItem) -> bool:
    """Whether the request is worded as in the training data."""
    return item.conversation.messages[-1] == prompts.synthesis(requested_text(item)).messages[-1]


def check_text(item: BenchmarkItem) -> None:
    """
    Raises:
        ValueError: the request contains no words.
    """
    if not plain_words(requested_text(item)):
        raise ValueError(f"the text to be read, {requested_text(item)!r}, contains no words")
