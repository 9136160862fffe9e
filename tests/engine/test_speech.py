"""Many replies decoded beside the model: same samples as alone, first chunks first, constant cost, clean ends."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vita_audio.audio import AudioTokenizer
from vita_audio.audio.glm4voice import GLM4VoiceTokenizer, StreamSchedule
from vita_audio.audio.glm4voice.estimator import Estimator
from vita_audio.audio.glm4voice.flow import FlowDecoder
from vita_audio.audio.mel_vq import MelVQConfig, MelVQTokenizer
from vita_audio.engine import SpeechChunk, SpeechEnd, SpeechError, SpeechStream, SpeechWorker

DECODER = Path(__file__).parents[1] / "goldens" / "glm4voice" / "decoder"
CODES = 256  # of both codecs


class SharingFlow(FlowDecoder):
    """The flow decoder as it works on a GPU: in passes that several rows share."""

    shares_passes = True


class SharingCodec(GLM4VoiceTokenizer):
    """The codec with that flow decoder, on the CPU."""

    @property
    def flow(self) -> FlowDecoder:
        flow = super().flow
        flow.__class__ = SharingFlow
        return flow


@pytest.fixture(scope="module")
def glm4voice() -> GLM4VoiceTokenizer:
    return GLM4VoiceTokenizer.from_pretrained(flow_path=DECODER)


@pytest.fixture(scope="module")
def sharing() -> SharingCodec:
    return SharingCodec(flow_path=DECODER)


@pytest.fixture
def failing(sharing, monkeypatch) -> SharingCodec:
    """Fails in the flow decoder at every code 13, with an error of two lines."""
    generate = FlowDecoder.generate

    def fail(self, inputs, steps):
        if any(13 in row.tokens for row in inputs):
            raise RuntimeError("no such sound\nand more about it")
        return generate(self, inputs, steps)

    monkeypatch.setattr(FlowDecoder, "generate", fail)
    return sharing


@pytest.fixture(scope="module")
def mel_vq() -> MelVQTokenizer:
    generator = torch.Generator().manual_seed(0)
    config = MelVQConfig(codebook_size=CODES, iterations=4)
    codebook = torch.zeros(CODES, config.patch_frames * config.mels)
    spectra = torch.rand(CODES, config.patch_frames, config.fft_size // 2 + 1, generator=generator)
    return MelVQTokenizer(config, codebook, spectra)


def reply(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices([code for code in range(CODES) if code != 13], k=count)


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alone(codec: AudioTokenizer, codes: list[int], seed: int, piece: int = 5) -> torch.Tensor:
    """All samples of a reply, through a stream of its own."""
    stream = codec.stream(noise(seed))
    parts = [stream.push(codes[start : start + piece]) for start in range(0, len(codes), piece)]
    return torch.cat([*parts, stream.push([], last=True)])


def sound(chunks: Sequence[SpeechChunk]) -> torch.Tensor:
    return torch.cat([torch.empty(0), *(chunk.samples for chunk in chunks)])


@st.composite
def scripts(draw) -> list[tuple[str, int, int]]:
    """Moves of several talkers in a random order: (move, stream, number of codes)."""
    moves = st.sampled_from(["push", "push", "push", "step", "finish", "cancel"])
    script = draw(st.lists(st.tuples(moves, st.integers(0, 4), st.integers(0, 30)), max_size=40))
    return [("step", 0, count % 3) if move == "step" else (move, who, count) for move, who, count in script]


@pytest.mark.parametrize("name", ["glm4voice", "sharing", "mel_vq"])
@pytest.mark.parametrize("threaded", [False, True])
def test_streams_that_join_push_cancel_and_finish_at_random_sound_as_each_alone(name, threaded, request):
    codec: AudioTokenizer = request.getfixturevalue(name)
    solo: dict[tuple[int, int], torch.Tensor] = {}

    @given(script=scripts())
    @settings(max_examples=4 if name == "sharing" else 10, deadline=None)
    def run(script):
        with SpeechWorker(codec, threaded=threaded) as worker:
            streams: dict[int, SpeechStream] = {}
            pushed: dict[int, list[int]] = {}
            cancelled: set[int] = set()
            finished: set[int] = set()
            for move, who, count in script:
                if move == "step":
                    for _ in range(count):
                        worker.step()
                    continue
                if who not in streams:
                    streams[who], pushed[who] = worker.open(noise(who)), []
                if move == "push" and who not in finished:
                    codes = reply(200, who)[len(pushed[who]) :][:count]
                    streams[who].push(codes)
                    pushed[who] += codes
                elif move == "finish":
                    streams[who].finish()
                    finished.add(who)
                elif move == "cancel" and who == 0:  # the others stay, so that there is something to hear
                    streams[who].cancel()
                    cancelled.add(who)
            for who, stream in streams.items():
                stream.finish()
                heard = sound(list(stream))
                if who in cancelled:
                    assert not len(heard)
                    continue
                key = (who, len(pushed[who]))
                if key not in solo:
                    solo[key] = alone(codec, pushed[who], who)
                assert torch.equal(heard, solo[key])
            assert not worker._decoders

    run()


def test_the_first_chunk_is_decoded_as_soon_as_its_eight_codes_exist(glm4voice):
    with SpeechWorker(glm4voice, threaded=False) as worker:
        stream = worker.open()
        for code in reply(7, 0):
            stream.push([code])
            assert not worker.step()
        stream.push([1])
        assert worker.step()
        (chunk,) = stream.take()
        assert chunk.codes == 8
        assert len(chunk.samples) > 0


def test_chunks_grow_with_whole_groups_of_eight_codes(glm4voice):
    with SpeechWorker(glm4voice, threaded=False) as worker:
        stream = worker.open()
        taken = []
        for start in range(0, 192, 8):
            stream.push(reply(192, 0)[start : start + 8])
            while worker.step():
                taken += [chunk.codes for chunk in stream.take()]
        assert taken == [8, 16, 32, 56, 88, 136, 184]


def test_a_stream_that_is_not_heard_yet_comes_before_the_backlog_of_others(glm4voice):
    with SpeechWorker(glm4voice, threaded=False) as worker:
        old = [worker.open() for _ in range(3)]
        for stream in old:
            stream.push(reply(120, 0))
        for _ in range(6):
            assert worker.step()
        newcomer = worker.open()
        newcomer.push(reply(8, 1))
        assert worker.step()
        assert newcomer.take()


def test_streams_with_a_backlog_take_turns(glm4voice):
    with SpeechWorker(glm4voice, threaded=False) as worker:
        streams = [worker.open() for _ in range(3)]
        for stream in streams:
            stream.push(reply(60, 0))
        for expected in (1, 2, 3):
            for _ in streams:
                worker.step()
            assert [len(stream._ready) for stream in streams] == [expected] * 3


def test_streams_that_are_due_at_the_same_chunk_share_its_solver_steps(sharing, monkeypatch):
    passes = []
    generate = FlowDecoder.generate
    monkeypatch.setattr(
        FlowDecoder,
        "generate",
        lambda self, inputs, steps: passes.append((len(inputs), steps)) or generate(self, inputs, steps),
    )
    with SpeechWorker(sharing, threaded=False) as worker:
        streams = [worker.open(noise(who)) for who in range(3)]
        for stream in streams:
            stream.push(reply(16, 0))
        while worker.step():
            pass
    assert passes == [(3, 1), (3, 3)]


def test_every_chunk_of_a_long_stream_in_company_costs_the_same(monkeypatch):
    codec = GLM4VoiceTokenizer(flow_path=DECODER, schedule=StreamSchedule(((8, 1), (16, 1), (48, 1))))
    frames = []
    forward = Estimator.forward

    def counting(self, x, *rest):
        frames.append(x.shape[0] * x.shape[2])
        return forward(self, x, *rest)

    monkeypatch.setattr(Estimator, "forward", counting)
    with SpeechWorker(codec, threaded=False) as worker:
        streams = [worker.open(noise(who)) for who in range(2)]
        chunks = []
        for start in range(0, 752, 8):  # a minute
            for stream in streams:
                stream.push(reply(752, 0)[start : start + 8])
            before = len(frames)
            while worker.step():
                chunks.append(sum(frames[before:]))
                before = len(frames)
    steady = chunks[8:]
    assert len(steady) == 26
    # A window begins at a block of ten codes: it has 50 to 59 codes, and a chunk 48, of 6.9 frames each.
    assert max(steady) - min(steady) <= 2 * 10 * 7
    assert abs(sum(steady[-10:]) - sum(steady[:10])) <= 10 * 2 * 2  # five chunks of each are a period


def test_one_thread_decodes_while_callers_push_and_is_gone_after_close(mel_vq):
    before = set(threading.enumerate())
    callers = []
    with SpeechWorker(mel_vq) as worker:
        streams = [
            worker.open(on_event=lambda event: callers.append(threading.current_thread())) for _ in range(4)
        ]
        (thread,) = set(threading.enumerate()) - before
        for stream in streams:
            stream.push(reply(40, 0))
        last = worker.open()
        last.push(reply(40, 0))
        last.finish()
        assert sum(len(chunk.samples) for chunk in last) == 40 * 1280
    assert set(threading.enumerate()) == before
    assert set(callers) == {thread}
    worker.close()
    with pytest.raises(RuntimeError, match="the speech worker is closed"):
        worker.open()


def test_close_wakes_those_who_wait_for_chunks(mel_vq):
    worker = SpeechWorker(mel_vq)
    stream, heard = worker.open(), []
    waiting = threading.Thread(target=lambda: heard.append(list(stream)))
    waiting.start()
    worker.close()
    waiting.join(30)
    assert heard == [[]]


def test_a_failing_codec_ends_only_the_streams_that_it_fails_for(failing):
    with SpeechWorker(failing, threaded=False) as worker:
        streams = [worker.open(noise(who)) for who in range(3)]
        replies = [reply(20, who) for who in range(3)]
        replies[1][10] = 13
        for stream, codes in zip(streams, replies, strict=True):
            stream.push(codes)
        while worker.step():
            pass
        for who in (0, 2):
            streams[who].finish()
            assert torch.equal(sound(list(streams[who])), alone(failing, replies[who], who))
        assert sound(list(streams[1]._ready)).numel() > 0
        with pytest.raises(SpeechError, match=r"^RuntimeError: no such sound$"):
            list(streams[1])
        with pytest.raises(SpeechError):
            streams[1].take()
        streams[1].push([1, 2])  # the model may not know yet
        assert not worker.step()


def test_a_failed_pass_leaves_its_streams_as_they_were(failing):
    codes = reply(24, 0)
    for generator in (lambda: noise(3), lambda: None):
        stream = failing.stream(generator())
        heard = [stream.push(codes[:10])]
        with pytest.raises(RuntimeError, match="no such sound"):
            failing.push_many([stream], [[13] * 20], [True])
        heard += [stream.push(codes[10:]), stream.push([], last=True)]
        undisturbed = failing.stream(generator())
        expected = [undisturbed.push(codes[:10]), undisturbed.push(codes[10:]), undisturbed.push([], True)]
        assert torch.equal(torch.cat(heard), torch.cat(expected))


def test_a_code_out_of_range_is_refused_where_it_is_pushed(glm4voice):
    with SpeechWorker(glm4voice, threaded=False) as worker:
        stream = worker.open(noise(42))
        stream.push(reply(4, 0))
        with pytest.raises(ValueError, match=r"code 256 at position 1 is outside \[0, 256\)"):
            stream.push([1, 256])
        stream.push(reply(8, 0)[4:])
        stream.finish()
        assert torch.equal(sound(list(stream)), alone(glm4voice, reply(8, 0), 42))
        with pytest.raises(ValueError, match="finished"):
            stream.push([1])


def test_a_cancelled_stream_says_nothing_more_and_leaves_nothing_behind(glm4voice):
    events: list[object] = []
    with SpeechWorker(glm4voice, threaded=False) as worker:
        silent, heard = worker.open(on_event=events.append), worker.open()
        for stream in (silent, heard):
            stream.push(reply(40, 0))
        worker.step()
        decoder = weakref.ref(worker._decoders[silent])
        count = len(events)
        silent.cancel()
        heard.cancel()
        gc.collect()
        assert decoder() is None
        assert silent.ended
        assert not worker.step()
        assert len(events) == count
        assert list(heard) == []
        assert heard.take() == []


def test_callbacks_get_every_chunk_and_then_the_end(mel_vq):
    events: list[SpeechChunk | SpeechEnd] = []
    done = threading.Event()

    def collect(event: SpeechChunk | SpeechEnd) -> None:
        events.append(event)
        if isinstance(event, SpeechEnd):
            done.set()

    with SpeechWorker(mel_vq) as worker:
        stream = worker.open(on_event=collect)
        for code in reply(33, 0):
            stream.push([code])
        stream.finish()
        assert done.wait(60)
    *chunks, end = events
    assert end == SpeechEnd()
    assert torch.equal(sound(chunks), alone(mel_vq, reply(33, 0), 0))
    assert [chunk.codes for chunk in chunks] == sorted(chunk.codes for chunk in chunks)
    assert chunks[-1].codes == 33


def test_an_error_in_a_callback_cancels_its_stream_only(mel_vq, caplog):
    def broken(event: SpeechChunk | SpeechEnd) -> None:
        raise KeyError("client left")

    with SpeechWorker(mel_vq, threaded=False) as worker:
        bad, good = worker.open(on_event=broken), worker.open()
        for stream in (bad, good):
            stream.push(reply(20, 0))
            stream.finish()
        assert torch.equal(sound(list(good)), alone(mel_vq, reply(20, 0), 0))
        assert bad.ended
    assert "its callback failed: KeyError: 'client left'" in caplog.text


def test_waiting_for_codes_that_cannot_come_is_refused(mel_vq):
    with SpeechWorker(mel_vq, threaded=False) as worker:
        stream = worker.open()
        stream.push([1, 2])
        with pytest.raises(RuntimeError, match="push more codes or finish the reply"):
            next(stream)


def test_a_codec_that_only_encodes_is_refused_at_once():
    with pytest.raises(ValueError, match="only encodes"):
        SpeechWorker(GLM4VoiceTokenizer(path=DECODER))


def test_a_worker_that_breaks_ends_its_streams(mel_vq, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    worker = SpeechWorker(mel_vq)

    def broken() -> bool:
        raise MemoryError

    monkeypatch.setattr(worker, "step", broken)
    stream = worker.open()
    stream.push(reply(20, 0))
    with pytest.raises(SpeechError, match="MemoryError"):
        list(stream)
    worker.close()
