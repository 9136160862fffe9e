"""Rounds at the machine's limit: many requests at once, lossless when asked; the algorithm of ``models.generation``."""

from vita_audio.engine.engine import Engine
from vita_audio.engine.requests import Finished, Handle, Request, Sampling, Stats, Tokens
from vita_audio.engine.sessions import Session
from vita_audio.engine.speech import SpeechChunk, SpeechEnd, SpeechError, SpeechStream, SpeechWorker
from vita_audio.engine.weights import AudioRows, Quantization, can_run, row_bytes

__all__ = [
    "AudioRows",
    "Engine",
    "Finished",
    "Handle",
    "Quantization",
    "Request",
    "Sampling",
    "Session",
    "SpeechChunk",
    "SpeechEnd",
    "SpeechError",
    "SpeechStream",
    "SpeechWorker",
    "Stats",
    "Tokens",
    "can_run",
    "row_bytes",
]
