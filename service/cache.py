"""Bodies by key: an LRU bounded in bytes, and one materialization per key however many wait.

Knows no HTTP and no torch. A second tier (Redis) belongs in `_fill`, before `produce` is asked.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

CHUNK = 256 << 10
DIGESTS = 4096
log = logging.getLogger("neumeta")


class Busy(RuntimeError):
    """As many bodies as are allowed are being made or wait to be."""


class Body:
    """A file that exists, or is being made: readers take what is there and wait for the rest.

    Its first bytes, `head`, are there from the start. `filled` moves on the event loop alone.
    """

    def __init__(self, head: bytes, length: int) -> None:
        self.head, self.length = head, length
        self.data = bytearray(length)
        self.data[: len(head)] = head
        self.filled = len(head)
        self.sha256: bytes | None = None
        self.error: BaseException | None = None
        self._grown = asyncio.Event()

    @property
    def repr_digest(self) -> str | None:
        """The Repr-Digest field (RFC 9530) once all bytes exist."""
        return f"sha-256=:{base64.b64encode(self.sha256).decode()}:" if self.sha256 else None

    def advance(self, filled: int) -> None:
        """The first `filled` bytes are there: wake the readers."""
        self.filled = filled
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more bytes will come."""
        self.error = error
        self._wake()

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def read(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Bytes [start, stop) in chunks of at most 256 KiB, uncopied, as they come to exist.

        Raises RuntimeError if the file could not be finished.
        """
        whole = memoryview(self.data).toreadonly()
        at = start
        while at < stop:
            if at < self.filled:
                end = min(stop, at + CHUNK, self.filled)
                yield whole[at:end]
                at = end
            elif self.error is not None:
                raise RuntimeError("the materialization failed") from self.error
            else:
                await self._grown.wait()


class Cache:
    """Finished bodies, least recently used first, and the flights that make new ones.

    The finished bodies are at most `max_bytes`, the flights at most `max_flights`, of which
    `samplers` run at once; `prepare` runs first in each sampler's thread.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        samplers: int = 1,
        max_flights: int = 64,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.max_bytes, self.max_flights, self.bytes = max_bytes, max_flights, 0
        self.finished: OrderedDict[str, Body] = OrderedDict()
        self.flights: dict[str, Body] = {}
        # A digest outlives its body: a client may ask for it after the bytes were dropped.
        self.digests: OrderedDict[str, str] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        # torch runs here, off the event loop and out of the shared thread pool.
        self._pool = ThreadPoolExecutor(samplers, "sampler", initializer=prepare)

    def get(
        self, key: str, head: bytes, length: int, produce: Callable[[], Iterator[bytes]]
    ) -> tuple[Body, str]:
        """The body of `key` and where it came from: 'memory', 'coalesced' or 'computed'.

        `produce` makes what follows `head`; it runs in a sampler's thread. Raises Busy.
        """
        if key in self.finished:
            self.finished.move_to_end(key)
            return self.finished[key], "memory"
        if key in self.flights:
            return self.flights[key], "coalesced"
        if len(self.flights) >= self.max_flights:
            raise Busy(f"{len(self.flights)} bodies are being made")
        body = self.flights[key] = Body(head, length)
        # The task is the cache's own: a client that leaves does not stop it.
        task = asyncio.create_task(self._fill(key, body, produce))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return body, "computed"

    async def _fill(self, key: str, body: Body, produce: Callable[[], Iterator[bytes]]) -> None:
        loop = asyncio.get_running_loop()

        def run() -> bytes:
            digest, at, space = hashlib.sha256(body.head), len(body.head), memoryview(body.data)
            for chunk in produce():
                end = at + len(chunk)
                if end > body.length:
                    raise ValueError(f"more than the {body.length} bytes that were planned")
                space[at:end] = chunk
                digest.update(chunk)
                at = end
                if at < body.length:  # the last byte waits until its digest can be asked for
                    loop.call_soon_threadsafe(body.advance, at)
            if at != body.length:
                raise ValueError(f"{at} bytes where {body.length} were planned")
            return digest.digest()

        try:
            body.sha256 = await loop.run_in_executor(self._pool, run)
            self._keep(key, body)
        except Exception as error:
            log.exception("materialization %s failed", key)
            body.fail(error)
        finally:
            del self.flights[key]
        if body.error is None:
            body.advance(body.length)

    def _keep(self, key: str, body: Body) -> None:
        assert body.repr_digest is not None
        self.digests[key] = body.repr_digest
        self.digests.move_to_end(key)
        if len(self.digests) > DIGESTS:
            self.digests.popitem(last=False)
        if body.length > self.max_bytes:
            return
        self.finished[key] = body
        self.bytes += body.length
        while self.bytes > self.max_bytes:
            _, old = self.finished.popitem(last=False)
            self.bytes -= old.length

    async def close(self) -> None:
        """Wait for the flights under way and stop the samplers."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._pool.shutdown()
