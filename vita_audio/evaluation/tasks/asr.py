"""Speech recognition: the model's text against the reference transcript (WER, CER)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vita_audio.chat import prompts
from vita_audio.evaluation.bench import Bench
from vita_audio.evaluation.items import BenchmarkItem, read_test_set
from vita_audio.evaluation.journal import Utterance
from vita_audio.evaluation.metrics import utterance_errors, word_tokens
from vita_audio.evaluation.normalisers import normaliser, plain_words
from vita_audio.evaluation.statistics import Marks, rates
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances, need_words

_TOKENS_BEYOND_PROMPT = 32


@dataclass(frozen=True)
class SpeechRecognition:
    """ASR. The output is text, so no recogniser is needed.

    Attributes:
        text_normaliser: of the columns that compare words without punctuation; the published columns do not use it.
    """

    text_normaliser: str = "words"
    name: str = "asr"
    title: str = "ASR"
    columns: tuple[Column, ...] = (
        Column("WER %", "asr_wer"),
        Column("CER %", "asr_cer"),
        Column("WER words %", "asr_wer_words"),
        Column("CER words %", "asr_cer_words"),
    )
    speaks: bool = False
    samples: bool = False
    open_system: bool = False

    def read(self, path: AnyPath, data_root: AnyPath | None = None, limit: int | None = None) -> Items:
        return read_test_set(path, data_root, limit, check=_check)

    def is_as_trained(self, item: BenchmarkItem) -> bool:
        return item.conversation.messages[-1] == prompts.transcription("").messages[-1]

    def run(self, bench: Bench, items: Sequence[BenchmarkItem]) -> list[Utterance]:
        """Transcribe every item.

        The length limit follows from the prompt, never from the reference (bug 13 of the data
        specification): speech has more codes than words, so a transcript longer than its prompt is certainly wrong.
        """
        return bench.written(
            items, lambda item: item.answer, limit=lambda prompt: prompt + _TOKENS_BEYOND_PROMPT
        )

    def marks(self, utterance: Utterance) -> Marks:
        """``asr_wer`` and ``asr_cer`` as the published scripts count them; ``..._words`` without punctuation."""
        normalise = normaliser(self.text_normaliser)
        reference, text = str(utterance.reference), utterance.text
        words = normalise(reference), normalise(text)
        return {
            "asr_wer": utterance_errors(reference, text),
            "asr_cer": utterance_errors(reference, text, characters=True),
            "asr_wer_words": utterance_errors(*words),
            "asr_cer_words": utterance_errors(*words, characters=True),
        }

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """The rates of :meth:`marks` as fractions, and the number of utterances behind them."""
        need_utterances(utterances)
        marks = [self.marks(utterance) for utterance in utterances]
        words = sum(one["asr_wer"][1] for one in marks)
        need_words(words)
        return {**rates(marks), "asr_utterances": len(utterances), "asr_reference_words": int(words)}


def _check(item: BenchmarkItem) -> None:
    if not word_tokens(item.answer) or not plain_words(item.answer):
        raise ValueError(f"the reference {item.answer!r} contains no words")
    if not item.conversation.messages[-1].num_audios:
        raise ValueError("the last question contains no <|audio|>, so there is nothing to transcribe")
