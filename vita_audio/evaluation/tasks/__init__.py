"""The benchmarks, each behind the :class:`Task` interface."""

from vita_audio.evaluation.tasks.asr import SpeechRecognition
from vita_audio.evaluation.tasks.seed_tts import SeedTTS
from vita_audio.evaluation.tasks.sqa import SPEECH_QA, TEXT_QA, QuestionAnswering
from vita_audio.evaluation.tasks.task import Column, Scores, Task, published_options
from vita_audio.evaluation.tasks.tts import SpeechSynthesis, run_recordings

__all__ = [
    "SPEECH_QA",
    "TEXT_QA",
    "Column",
    "QuestionAnswering",
    "Scores",
    "SeedTTS",
    "SpeechRecognition",
    "SpeechSynthesis",
    "Task",
    "published_options",
    "run_recordings",
]
