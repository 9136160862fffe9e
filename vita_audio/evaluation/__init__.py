"""Scores of speech models: metrics, recognisers, and the ASR, TTS and speech-QA benchmarks."""

from vita_audio.extras import needs_extra

with needs_extra("eval"):
    from vita_audio.evaluation.answers import contains_answer
    from vita_audio.evaluation.metrics import (
        CorpusErrors,
        ErrorCounts,
        character_error_rate,
        corpus_error_rate,
        read_transcripts,
        seed_tts_error_rate,
        word_error_rate,
    )

__all__ = [
    "CorpusErrors",
    "ErrorCounts",
    "character_error_rate",
    "contains_answer",
    "corpus_error_rate",
    "read_transcripts",
    "seed_tts_error_rate",
    "word_error_rate",
]
