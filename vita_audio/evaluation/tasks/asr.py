"""Speech recognition: the model's text against the reference transcript (WER, CER)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vita_audio.chat import prompts
from vita_audio.evaluation.benchmarks import Bench, BenchmarkItem, Utterance, gather, read_test_set
from vita_audio.evaluation.metrics import corpus_error_rate, word_tokens
from vita_audio.evaluation.normalisers import plain_words
from vita_audio.evaluation.tasks.task import AnyPath, Column, Items, Scores, need_utterances

_TOKENS_BEYOND_PROMPT = 32


@dataclass(frozen=True)
class SpeechRecognition:
    """ASR. The output is text, so no recogniser is needed."""

    name: str = "asr"
    title: str = "ASR"
    columns: tuple[Column, ...] = (Column("WER %", "asr_wer"), Column("CER %", "asr_cer"))
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
        replies = bench.replies(items, limit=lambda longest_prompt: longest_prompt + _TOKENS_BEYOND_PROMPT)
        return gather([Utterance(item.id, item.answer, reply.text) for item, reply in replies])

    def score(self, utterances: Sequence[Utterance]) -> Scores:
        """``asr_wer`` and ``asr_cer`` as fractions, and the number of utterances behind them."""
        need_utterances(utterances)
        references = {utterance.id: str(utterance.reference) for utterance in utterances}
        texts: dict[str, str | None] = {utterance.id: utterance.text for utterance in utterances}
        words = corpus_error_rate(references, texts)
        return {
            "asr_wer": words.rate,
            "asr_cer": corpus_error_rate(references, texts, characters=True).rate,
            "asr_utterances": len(utterances),
            "asr_reference_words": words.counts.reference_tokens,
        }


def _check(item: BenchmarkItem) -> None:
    if not word_tokens(item.answer) or not plain_words(item.answer):
        raise ValueError(f"the reference {item.answer!r} contains no words")
    if not item.conversation.messages[-1].num_audios:
        raise ValueError("the last question contains no <|audio|>, so there is nothing to transcribe")
