"""The cache alone, with producers made for the test: one flight, bounded bytes, early first bytes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Callable, Coroutine, Iterator

import pytest

from service.cache import CHUNK, Body, Busy, Cache

HEAD = b"the header"


async def read(body: Body, start: int = 0, stop: int | None = None) -> bytes:
    stop = body.length if stop is None else stop
    return b"".join([bytes(chunk) async for chunk in body.read(start, stop)])


def run(coroutine: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def test_the_head_is_there_before_a_sampler_is_free() -> None:
    async def check() -> None:
        cache = Cache(1000, samplers=1)
        released = threading.Event()

        def blocked() -> Iterator[bytes]:
            assert released.wait(20)
            yield b"rest"

        first, _ = await cache.get("first", HEAD, len(HEAD) + 4, blocked)
        queued, tier = await cache.get("queued", HEAD, len(HEAD) + 4, lambda: iter([b"more"]))
        assert tier == "computed"
        assert await read(queued, 0, len(HEAD)) == HEAD
        assert queued.filled == len(HEAD) and queued.repr_digest is None
        released.set()
        assert await read(first) == HEAD + b"rest"
        assert await read(queued) == HEAD + b"more"
        await cache.close()

    run(check())


def test_readers_of_one_key_share_one_flight_and_any_range() -> None:
    async def check() -> None:
        cache = Cache(1 << 20, samplers=2)
        calls = 0

        def produce() -> Iterator[bytes]:
            nonlocal calls
            calls += 1
            for number in range(100):
                yield bytes([number]) * 1000

        whole = HEAD + b"".join(bytes([number]) * 1000 for number in range(100))
        bodies = [await cache.get("key", HEAD, len(whole), produce) for _ in range(20)]
        assert [tier for _, tier in bodies] == ["computed"] + ["coalesced"] * 19
        spans = [(number * 4000, number * 4000 + 9000) for number in range(20)]
        parts = await asyncio.gather(
            *(read(body, *span) for (body, _), span in zip(bodies, spans, strict=True))
        )
        assert parts == [whole[start:stop] for start, stop in spans]
        assert await read(bodies[0][0]) == whole  # whoever has the last byte finds it in memory
        body, tier = await cache.get("key", HEAD, len(whole), produce)
        assert tier == "memory" and await read(body) == whole and calls == 1
        digest = base64.b64encode(hashlib.sha256(whole).digest()).decode()
        assert body.repr_digest == f"sha-256=:{digest}:" == cache.digests["key"]
        await cache.close()

    run(check())


def test_the_last_byte_comes_after_the_digest() -> None:
    """A client asks for the digest as soon as it has the last byte."""

    async def check() -> None:
        for cache in (Cache(1000), Cache(0)):
            body, _ = await cache.get("key", HEAD, len(HEAD) + 1, lambda: iter([b"!"]))
            assert await read(body) == HEAD + b"!"
            assert cache.digests["key"] == body.repr_digest
            await cache.close()

    run(check())


def test_chunks_are_bounded_and_not_copied() -> None:
    async def check() -> None:
        cache = Cache(1 << 22)
        length = 3 * CHUNK + 5
        body, _ = await cache.get("key", b"", length, lambda: iter([b"x" * length]))
        chunks = [chunk async for chunk in body.read(0, length)]
        assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, CHUNK, 5]
        assert all(chunk.obj is body.data and chunk.readonly for chunk in chunks)
        await cache.close()

    run(check())


def test_the_least_recently_used_leaves_first() -> None:
    async def check() -> None:
        cache = Cache(30)

        async def fetch(key: str) -> str:
            body, tier = await cache.get(key, b"", 10, lambda: iter([b"0123456789"]))
            await read(body)
            return tier

        assert [await fetch(key) for key in "abc"] == ["computed"] * 3
        assert await fetch("a") == "memory"
        assert await fetch("d") == "computed"
        assert list(cache.finished) == ["c", "a", "d"] and cache.bytes == 30
        assert await fetch("b") == "computed"
        big, _ = await cache.get("big", b"", 31, lambda: iter([b"x" * 31]))
        assert len(await read(big)) == 31
        assert "big" not in cache.finished and cache.bytes == 30
        await cache.close()

    run(check())


@pytest.mark.parametrize(
    ("chunks", "why"),
    [([b"short"], "5 bytes where 10"), ([b"far too long"], "more than the 10"), (None, "broken")],
)
def test_a_failed_flight_fails_every_reader_and_is_forgotten(
    chunks: list[bytes] | None, why: str
) -> None:
    async def check() -> None:
        cache = Cache(1000)

        def produce() -> Iterator[bytes]:
            if chunks is None:
                raise OSError("broken")
            yield from chunks

        body, _ = await cache.get("key", b"", 10, produce)
        results = await asyncio.gather(read(body), read(body), return_exceptions=True)
        for result in results:
            assert isinstance(result, RuntimeError) and why in str(result.__cause__)
        assert not cache.finished and not cache.flights and not cache.digests
        body, tier = await cache.get("key", b"", 10, lambda: iter([b"0123456789"]))
        assert tier == "computed" and await read(body) == b"0123456789"
        await cache.close()

    run(check())


def test_more_flights_than_allowed_are_refused_but_no_reader_of_one_is() -> None:
    async def check() -> None:
        cache = Cache(1000, max_flights=2)
        released = threading.Event()

        def blocked() -> Iterator[bytes]:
            assert released.wait(20)
            yield b"x"

        bodies = [(await cache.get(key, b"", 1, blocked))[0] for key in "ab"]
        with pytest.raises(Busy):
            await cache.get("c", b"", 1, blocked)
        assert (await cache.get("a", b"", 1, blocked))[1] == "coalesced"
        released.set()
        assert [await read(body) for body in bodies] == [b"x", b"x"]
        assert (await cache.get("c", b"", 1, blocked))[1] == "computed"
        await cache.close()

    run(check())


def test_a_reader_that_leaves_stops_nobody() -> None:
    async def check() -> None:
        cache = Cache(1000)
        released = threading.Event()

        def blocked() -> Iterator[bytes]:
            assert released.wait(20)
            yield b"x"

        body, _ = await cache.get("key", b"", 1, blocked)
        leaving = asyncio.create_task(read(body))
        staying = asyncio.create_task(read(body))
        await asyncio.sleep(0)
        leaving.cancel()
        released.set()
        assert await staying == b"x"
        assert leaving.cancelled()
        await cache.close()

    run(check())


def gated() -> tuple[threading.Event, threading.Event, Callable[[], Iterator[bytes]]]:
    """A producer of 'ab' that waits before each byte; whether it began; what lets it go on."""
    began, released = threading.Event(), threading.Event()

    def produce() -> Iterator[bytes]:
        began.set()
        assert released.wait(20)
        yield b"a"
        yield b"b"

    return began, released, produce


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def cancelled(cache: Cache) -> float:
    found = cache.metrics.registry.get_sample_value("neumeta_sampling_cancelled_total")
    assert found is not None
    return found


def test_the_last_reader_to_leave_stops_the_sampling() -> None:
    async def check() -> None:
        cache = Cache(1000)
        began, released, produce = gated()
        first, _ = await cache.get("key", b"", 2, produce)
        second, tier = await cache.get("key", b"", 2, produce)
        assert second is first and tier == "coalesced"
        await until(began.is_set)
        first.leave()
        assert "key" in cache.flights and cancelled(cache) == 0
        second.leave()
        assert "key" not in cache.flights
        # Who comes now has a flight of their own.
        third, tier = await cache.get("key", b"", 2, lambda: iter([b"xy"]))
        assert tier == "computed" and third is not first
        released.set()
        assert await read(third) == b"xy"
        await cache.close()
        assert cancelled(cache) == 1 and first.filled < 2 and first.sha256 is None
        assert cache.finished["key"] is third and cache.making == 0

    run(check())


def test_a_flight_abandoned_in_the_queue_never_runs() -> None:
    async def check() -> None:
        cache = Cache(1000, max_flights=2)
        began, released, produce = gated()
        running, _ = await cache.get("running", b"", 2, produce)
        await until(began.is_set)
        ran = threading.Event()

        def never() -> Iterator[bytes]:
            ran.set()
            yield b"xy"

        waiting, _ = await cache.get("waiting", b"", 2, never)
        queue = lambda: cache.metrics.registry.get_sample_value("neumeta_queue")
        await until(lambda: queue() == 1)
        waiting.leave()
        await until(lambda: cache.making == 1)
        assert queue() == 0
        other, _ = await cache.get("other", b"", 2, lambda: iter([b"cd"]))  # not Busy
        released.set()
        assert await read(running) == b"ab" and await read(other) == b"cd"
        await cache.close()
        assert not ran.is_set() and cancelled(cache) == 1

    run(check())


def test_a_reader_who_got_all_it_asked_for_stops_nothing() -> None:
    """It asks for the next range now."""

    async def check() -> None:
        cache = Cache(1000)
        began, released, produce = gated()
        body, _ = await cache.get("key", HEAD, len(HEAD) + 2, produce)
        assert await read(body, 0, len(HEAD)) == HEAD
        body.leave()
        released.set()
        again, tier = await cache.get("key", HEAD, len(HEAD) + 2, produce)
        assert again is body and await read(again) == HEAD + b"ab"
        assert cancelled(cache) == 0
        await cache.close()

    run(check())


def test_leaving_a_finished_body_changes_nothing() -> None:
    async def check() -> None:
        cache = Cache(1000)
        body, _ = await cache.get("key", b"", 2, lambda: iter([b"ab"]))
        await until(lambda: not cache.flights)
        body.leave()
        again, tier = await cache.get("key", b"", 2, lambda: iter([b"xy"]))
        assert tier == "memory" and await read(again) == b"ab" and cancelled(cache) == 0
        await cache.close()

    run(check())
