"""Bodies by key: an LRU bounded in bytes, and one materialization per key however many wait.

Knows no HTTP and no torch. A second tier (Redis) belongs between `memory` and `produce`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

CHUNK = 256 << 10


class Body:
    """A file that exists, or is being made: readers take what is there and wait for the rest."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.data = bytearray()
        self.sha256: bytes | None = None
        self.error: BaseException | None = None
        self.grown = asyncio.Condition()

    @property
    def repr_digest(self) -> str | None:
        """The Repr-Digest field (RFC 9530) once all bytes exist."""
        return f"sha-256=:{base64.b64encode(self.sha256).decode()}:" if self.sha256 else None

    async def read(self, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes [start, stop) in chunks of at most 256 KiB, as they come to exist.

        Raises RuntimeError if the file could not be finished.
        """
        at = start
        while at < stop:
            async with self.grown:
                await self.grown.wait_for(lambda: len(self.data) > at or self.error is not None)
            if len(self.data) <= at:
                raise RuntimeError("materialization failed") from self.error
            end = min(stop, at + CHUNK, len(self.data))
            yield bytes(self.data[at:end])
            at = end


class Cache:
    """Finished bodies, least recently used first, at most `max_bytes` of them; flights by key."""

    def __init__(self, max_bytes: int, workers: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.finished: OrderedDict[str, Body] = OrderedDict()
        self.flights: dict[str, Body] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        # torch runs here, off the event loop and out of the shared thread pool.
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="sampler")

    def get(
        self, key: str, length: int, produce: Callable[[], Iterator[bytes]]
    ) -> tuple[Body, str]:
        """The body of `key` and where it came from: 'memory', 'coalesced' or 'computed'."""
        if key in self.finished:
            self.finished.move_to_end(key)
            return self.finished[key], "memory"
        if key in self.flights:
            return self.flights[key], "coalesced"
        body = Body(length)
        self.flights[key] = body
        # The task is the cache's own: a client that leaves does not stop it.
        task = asyncio.create_task(self._fill(key, body, produce))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return body, "computed"

    async def _fill(self, key: str, body: Body, produce: Callable[[], Iterator[bytes]]) -> None:
        loop = asyncio.get_running_loop()

        async def append(chunk: bytes) -> None:
            async with body.grown:
                body.data += chunk
                body.grown.notify_all()

        def run() -> bytes:
            digest = hashlib.sha256()
            for chunk in produce():
                digest.update(chunk)
                asyncio.run_coroutine_threadsafe(append(chunk), loop).result()
            return digest.digest()

        try:
            digest = await loop.run_in_executor(self.pool, run)
            if len(body.data) != body.length:
                raise RuntimeError(f"{len(body.data)} bytes where {body.length} were planned")
            body.sha256 = digest
            self._keep(key, body)
        except Exception as error:
            body.error = error
        finally:
            self.flights.pop(key, None)
            async with body.grown:
                body.grown.notify_all()

    def _keep(self, key: str, body: Body) -> None:
        if body.length > self.max_bytes:
            return
        self.finished[key] = body
        self.bytes += body.length
        while self.bytes > self.max_bytes:
            _, old = self.finished.popitem(last=False)
            self.bytes -= old.length

    async def close(self) -> None:
        """Wait for the flights under way and stop the samplers."""
        if self.tasks:
            await asyncio.wait(self.tasks)
        self.pool.shutdown()
