"""Speech QA: is the answer in what the model wrote (S→T), and in what it said (S→S)?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vita_audio.evaluation.benchmark import (
    BenchmarkItem,
    Listener,
    Utterance,
    batched_replies,
    spoken_utterances,
)
from vita_audio.evaluation.metrics import contains_answer
from vita_audio.inference import GenerationOptions, SpeechPipeline


def run_sqa(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    options: GenerationOptions,
    listener: Listener,
    folder: Path,
    batch_size: int = 32,
) -> list[Utterance]:
    """Answer every spoken question aloud; WAV files go to ``folder/wav/sqa``."""
    replies = batched_replies(pipeline, items, options, batch_size, "speech QA")
    return spoken_utterances(replies, listener, folder, "sqa", lambda item: list(item.answers))


def score_sqa(utterances: Sequence[Utterance]) -> dict[str, float | int]:
    """Accuracies as fractions of all questions.

    ``sqa_s2t_accuracy`` and ``sqa_s2s_accuracy`` use the published containment rule, but a reply
    without speech is wrong in S→S instead of being left out (bug 17 of the data specification);
    ``..._whole_words`` use the strict rule, by which "eighteen" does not contain "eight".
    """
    total = len(utterances)
    spoken = [utterance for utterance in utterances if utterance.heard is not None]

    def accuracy(whole_words: bool, heard: bool) -> float:
        correct = sum(
            contains_answer(
                utterance.heard if heard else utterance.text, utterance.reference, whole_words=whole_words
            )
            for utterance in (spoken if heard else utterances)
        )
        return correct / total

    return {
        "sqa_s2t_accuracy": accuracy(whole_words=False, heard=False),
        "sqa_s2s_accuracy": accuracy(whole_words=False, heard=True),
        "sqa_s2t_accuracy_whole_words": accuracy(whole_words=True, heard=False),
        "sqa_s2s_accuracy_whole_words": accuracy(whole_words=True, heard=True),
        "sqa_questions": total,
        "sqa_without_audio": total - len(spoken),
    }
