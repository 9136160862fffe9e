"""What a server waits for before it ends, by itself: no connection keeps it alive here."""

import asyncio
import time

import pytest

from vita_audio.serving import ServeOptions, Service
from vita_audio.serving.errors import ApiError


def test_it_waits_for_the_last_reply(pipeline):
    async def drained() -> list[str]:
        service, order = Service(pipeline, ServeOptions(), "tiny"), []

        async def reply(name: str, seconds: float) -> None:
            with service.work():
                await asyncio.sleep(seconds)
                order.append(name)

        replies = [asyncio.create_task(reply(*each)) for each in (("short", 0.1), ("long", 0.5))]
        await asyncio.sleep(0.01)
        service.draining = True
        with pytest.raises(ApiError, match="shutting down"), service.work():
            order.append("late")
        await service.until_idle()
        order.append("idle")
        await asyncio.gather(*replies)
        return order

    assert asyncio.run(drained()) == ["short", "long", "idle"]


def test_it_waits_no_longer_than_it_is_told(pipeline):
    async def waited() -> float:
        service = Service(pipeline, ServeOptions(drain_seconds=0.3), "tiny")
        with service.work():
            start = time.monotonic()
            await service.until_idle()
            return time.monotonic() - start

    assert 0.3 <= asyncio.run(waited()) < 5
