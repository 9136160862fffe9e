"""What the server measures, for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vita_audio.inference import AudioChunk, Reply

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
"""Type of the page that Prometheus reads."""

_SECONDS = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0)
_SPEEDS = (10, 20, 50, 100, 200, 300, 500, 750, 1000, 2000, 5000)
_ROUND_TOKENS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 10, 11)


class Metrics:
    """Counters of one server; :meth:`text` is the page that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vita_audio_requests_total", "Requests by address and status", ["path", "status"], registry=self.registry
        )  # fmt: skip
        self.replies = Counter(
            "vita_audio_replies_total", "Replies by how they ended", ["outcome"], registry=self.registry
        )
        self.tokens = Counter("vita_audio_tokens_total", "Tokens generated", registry=self.registry)
        self.sound = Counter("vita_audio_sound_seconds_total", "Speech sent", registry=self.registry)
        self.underruns = Counter(
            "vita_audio_underruns_total", "Pauses of a player that plays as sound comes", registry=self.registry
        )  # fmt: skip
        self.first_chunk = self._histogram("first_chunk", "From the request to its first codes", _SECONDS)
        self.first_sound = self._histogram("first_sound", "From the request to its first sound", _SECONDS)
        self.speed = Histogram(
            "vita_audio_tokens_per_second", "Speed of a reply", buckets=_SPEEDS, registry=self.registry
        )
        self.round_tokens = Histogram(
            "vita_audio_accepted_tokens_per_round", "Tokens that a reply gained per round: the backbone's own and the "
            "heads'; of the latter, those that the backbone accepted if the reply is lossless",
            buckets=_ROUND_TOKENS, registry=self.registry,
        )  # fmt: skip
        self.drafts = Counter(
            "vita_audio_drafts_total", "Tokens drafted in lossless replies", registry=self.registry
        )
        self.accepted = Counter(
            "vita_audio_accepted_drafts_total", "Of these, those that the backbone accepted", registry=self.registry
        )  # fmt: skip
        self.slots = self._gauge("slots_used", "Replies that are being generated")
        self.waiting = self._gauge("queue", "Requests that wait for a slot")
        self.sessions = self._gauge("sessions", "Open realtime connections")
        self._gauge("threads", "Threads of the server").set_function(threading.active_count)
        ProcessCollector(
            registry=self.registry
        )  # memory, processor time and open files, by their usual names

    def observe(self, reply: Reply) -> None:
        """Record a complete reply."""
        timings = reply.timings
        self.tokens.inc(timings.new_tokens)
        self.speed.observe(timings.tokens_per_second)
        if reply.stats is not None and reply.stats.rounds:
            self.round_tokens.observe(reply.stats.new_tokens / reply.stats.rounds)
            self.drafts.inc(reply.stats.drafts)
            self.accepted.inc(reply.stats.accepted)
        if timings.first_chunk is not None:
            self.first_chunk.observe(timings.first_chunk)
        if timings.first_sound is not None:
            self.first_sound.observe(timings.first_sound)
        if reply.waveform is not None:
            self.sound.inc(len(reply.waveform) / reply.sample_rate)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vita_audio_{name}_seconds", what, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"vita_audio_{name}", what, registry=self.registry)


def joined_pages(pages: Mapping[str, str]) -> bytes:
    """The pages of several servers as one; each figure has its server's name as the label ``replica``."""
    registry = CollectorRegistry()
    registry.register(_Joined(pages))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, pages: Mapping[str, str]):
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for family in text_string_to_metric_families(page):
                joined = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    joined.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        yield from families.values()


class Player:
    """Counts the pauses of a player that begins with the first sound and plays as it comes.

    Args:
        rate: of the samples, in Hz.
    """

    def __init__(self, rate: int):
        self._rate = rate
        self._ends: float | None = None
        self.underruns = 0

    def hear(self, chunk: AudioChunk) -> None:
        """The next chunk, at the time that it states."""
        if not len(chunk.samples):
            return
        if self._ends is not None and chunk.seconds > self._ends:
            self.underruns += 1
        begins = chunk.seconds if self._ends is None else max(self._ends, chunk.seconds)
        self._ends = begins + len(chunk.samples) / self._rate
