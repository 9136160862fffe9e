"""Speed of replies, one at a time, for all modes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from vita_audio.evaluation.bench import SPOKEN_REPLY_TOKENS
from vita_audio.evaluation.items import BenchmarkItem
from vita_audio.evaluation.modes import mode_fields
from vita_audio.evaluation.tasks.task import Column, Scores
from vita_audio.inference import AudioChunk, GenerationOptions, SpeechPipeline, Timings

SPEED_COLUMNS = (
    Column("tokens/s", "tokens_per_second", ".0f", 1),
    Column("first chunk ms", "first_chunk_seconds", ".0f", 1000),
    Column("first sound ms", "first_sound_seconds", ".0f", 1000),
)


def measure_speed(
    pipeline: SpeechPipeline,
    items: Sequence[BenchmarkItem],
    modes: Sequence[str],
    *,
    max_new_tokens: int = SPOKEN_REPLY_TOKENS,
) -> dict[str, Scores]:
    """Speed of single replies. Each item is run in every mode in turn, which makes the modes comparable.

    The first item is a warm-up and does not count, unless it is the only one.

    Returns:
        For each mode, the figures of :func:`speed_scores`.
    """
    options = {
        mode: GenerationOptions.greedy(max_new_tokens=max_new_tokens, **mode_fields(mode)) for mode in modes
    }
    warm_up, *measured = items if len(items) > 1 else [*items, *items]
    for mode in modes:
        pipeline.reply(warm_up.conversation, options[mode], decode=False)
    timings: dict[str, list[Timings]] = {mode: [] for mode in modes}
    sounds: dict[str, list[float | None]] = {mode: [] for mode in modes}
    for item in measured:
        for mode in modes:
            timings[mode].append(pipeline.reply(item.conversation, options[mode], decode=False).timings)
            sounds[mode].append(first_sound_seconds(pipeline, item, options[mode]))
    return {mode: speed_scores(timings[mode], sounds[mode]) for mode in modes}


def speed_scores(timings: Sequence[Timings], sounds: Sequence[float | None]) -> Scores:
    """Medians over replies.

    Args:
        timings: timings of replies without decoding.
        sounds: seconds from each question to its first decoded samples; None for none.

    Returns:
        ``tokens_per_second`` of generation; ``first_chunk_seconds`` from the finished prompt to the last code of
        the first audio chunk; ``first_sound_seconds`` from the question to the first decoded samples, including
        prompt and decoder.
    """
    chunks = [timing.first_chunk - timing.prompt for timing in timings if timing.first_chunk is not None]
    heard = [seconds for seconds in sounds if seconds is not None]
    return {
        "tokens_per_second": median(timing.tokens_per_second for timing in timings),
        "first_chunk_seconds": median(chunks) if chunks else None,
        "first_sound_seconds": median(heard) if heard else None,
        "speed_utterances": len(timings),
    }


def first_sound_seconds(
    pipeline: SpeechPipeline, item: BenchmarkItem, options: GenerationOptions
) -> float | None:
    """Streams a reply until its first samples; None if it has none."""
    events = pipeline.stream(item.conversation, options)
    try:
        return next(
            (event.seconds for event in events if isinstance(event, AudioChunk) and len(event.samples)), None
        )
    finally:
        events.close()
