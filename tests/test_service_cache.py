"""The cache alone, with producers made for the test: one flight, bounded bytes, early first bytes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections.abc import Coroutine, Iterator

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
        assert calls == 1
        body, tier = await cache.get("key", HEAD, len(whole), produce)
        assert tier == "memory" and await read(body) == whole
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
