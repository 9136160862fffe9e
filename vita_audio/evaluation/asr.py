"""Speech recognition: the model's text against the reference transcript (WER, CER)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vita_audio.evaluation.benchmark import BenchmarkItem, Utterance, batched_replies, gather
from vita_audio.evaluation.metrics import corpus_error_rate
from vita_audio.inference import GenerationOptions, SpeechPipeline

_TOKENS_BEYOND_PROMPT = 32


def run_asr(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    options: GenerationOptions,
    batch_size: int = 32,
) -> list[Utterance]:
    """Transcribe every item.

    The length limit follows from the prompt, never from the reference (bug 13 of the data
    specification): speech has more codes than words, so a transcript longer than its prompt is wrong anyway.
    """

    def limited(longest_prompt: int) -> GenerationOptions:
        return replace(
            options, max_new_tokens=min(options.max_new_tokens, longest_prompt + _TOKENS_BEYOND_PROMPT)
        )

    return gather(
        [
            Utterance(item.id, item.answer, reply.text)
            for item, reply in batched_replies(pipeline, items, limited, batch_size, "ASR")
        ]
    )


def score_asr(utterances: Sequence[Utterance]) -> dict[str, float | int]:
    """``asr_wer`` and ``asr_cer`` as fractions, and the number of utterances behind them."""
    references = {utterance.id: utterance.reference for utterance in utterances}
    texts = {utterance.id: utterance.text for utterance in utterances}
    words = corpus_error_rate(references, texts)
    return {
        "asr_wer": words.rate,
        "asr_cer": corpus_error_rate(references, texts, characters=True).rate,
        "asr_utterances": len(utterances),
        "asr_reference_words": words.counts.reference_tokens,
    }
