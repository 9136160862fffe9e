"""Speech synthesis: word error rate of the model's speech, by an independent recogniser.

No model can sound clearer than its codec. The same recogniser therefore also transcribes each reference recording,
unchanged and after the codec (encode, decode). The latter is the codec floor, the baseline for the model's figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vita_audio.audio import AudioTokenizer
from vita_audio.chat import prompts
from vita_audio.evaluation.bench import Bench, Started
from vita_audio.evaluation.items import BenchmarkItem, read_test_set
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.metrics import utterance_errors
from vita_audio.evaluation.normalisers import normaliser, plain_words
from vita_audio.evaluation.statistics import Mark, Marks, rate, rates
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances, need_words


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
        Column("SIM", "tts_similarity", ".3f", 1),
        Column("DNSMOS", "tts_quality", ".2f", 1),
    )
    speaks: bool = True
    samples: bool = True
    open_system: bool = False

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        return read_test_set(path, data_root, limit, check=check_text)

    def marks(self, utterance: Utterance) -> Marks:
        """``tts_wer`` counts an utterance without speech as wholly deleted; ``tts_wer_answered``
        leaves it out, as the published scripts do (bug 17 of the data specification)."""
        errors = self._errors(utterance)
        marks = {"tts_wer": errors} | ({} if utterance.heard is None else {"tts_wer_answered": errors})
        return marks | sound_marks("tts", utterance)

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """The rates of :meth:`marks` as fractions, and the numbers behind them."""
        need_utterances(utterances)
        marks = [self.marks(utterance) for utterance in utterances]
        words = sum(one["tts_wer"][1] for one in marks)
        need_words(words)
        return {
            "tts_wer_answered": None,
            **rates(marks),
            "tts_utterances": len(utterances),
            "tts_without_audio": sum(utterance.heard is None for utterance in utterances),
            "tts_reference_words": int(words),
        }

    def score_recordings(self, resynthesised: Sequence[Utterance], natural: Sequence[Utterance]) -> Scores:
        """``tts_floor_wer`` of the recordings after the codec, and ``tts_natural_wer`` of the originals."""
        return {
            "tts_floor_wer": rate([self._errors(utterance) for utterance in resynthesised]),
            "tts_natural_wer": rate([self._errors(utterance) for utterance in natural]),
        }

    def _errors(self, utterance: Utterance) -> Mark:
        normalise = normaliser(self.text_normaliser)
        heard = None if utterance.heard is None else normalise(utterance.heard)
        return utterance_errors(normalise(str(utterance.reference)), heard)


def run_recordings(
    bench: Bench, codec: AudioTokenizer, items: Sequence[BenchmarkItem]
) -> tuple[list[Utterance], list[Utterance]]:
    """Recognise the reference recordings, after the codec and unchanged.

    Returns:
        Utterances of the resynthesised and of the natural speech; empty without recordings.
    """
    listener = bench.listener
    assert listener is not None, "recognising recordings needs a listener"
    recorded = [item for item in items if item.reference_audio is not None]

    def resynthesise(item: BenchmarkItem) -> Started:
        wav = bench.wav(item.id)
        heard = bench.hear(codec.encode(str(item.reference_audio)), wav)
        return Started(Utterance(item.id, requested_text(item), "", wav=wav.as_posix()), heard)

    def listen(item: BenchmarkItem) -> Started:
        recording = str(item.reference_audio)
        utterance = Utterance(item.id, requested_text(item), "", wav=recording)
        return Started(utterance, listener.hear_file(recording))

    return (
        bench.recorded("resynthesised", recorded, requested_text, resynthesise),
        bench.recorded("natural", recorded, requested_text, listen),
    )


def sound_marks(prefix: str, utterance: Utterance) -> dict[str, Mark]:
    """The marks of the voice's similarity and of the speech's quality, if they were measured."""
    found = {"similarity": utterance.similarity, "quality": utterance.quality}
    return {f"{prefix}_{name}": (value, 1.0) for name, value in found.items() if value is not None}


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
