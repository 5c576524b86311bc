"""Bodies by key: an LRU bounded in bytes, then a tier shared by replicas, then a materialization.

One materialization per key however many wait for it, and one across replicas while their shared tier
answers. Knows no HTTP, no torch and no Redis: the shared tier is whatever speaks `Shared`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

from service.metrics import Metrics

CHUNK = 256 << 10
DIGESTS = 4096
POLL = (0.01, 0.25)
"""Seconds between looks at what another replica makes: the first pause and the longest."""
LEASES = 6
"""A replica that waits for others makes the body itself after this many lease times."""

log = logging.getLogger("neumeta")
Found = tuple[bytearray, bytes]
"""A whole body and its sha256."""


class Busy(RuntimeError):
    """As many bodies as are allowed are being made or wait to be."""


class Away(RuntimeError):
    """The shared tier did not answer."""


class Abandoned(RuntimeError):
    """Every reader left before the body was made."""


class Shared(Protocol):
    """The tier that replicas share. `get` and `lease` raise Away; nothing else raises."""

    lease_seconds: float

    async def get(self, key: str, head: bytes, length: int) -> Found | None:
        """The verified body of `key`, if it is there."""

    async def put(self, key: str, body: bytearray, sha256: bytes) -> None:
        """Keep a finished body."""

    async def lease(self, key: str, token: str) -> bool:
        """Whether `token` now holds the right to make `key`, for `lease_seconds`."""

    async def renew(self, key: str, token: str) -> None:
        """Hold it for `lease_seconds` from now."""

    async def release(self, key: str, token: str) -> None:
        """Give it up, if `token` holds it."""


class Body:
    """A file that exists, or is being made: readers take what is there and wait for the rest.

    Its first bytes, `head`, are there from the start. All fields move on the event loop alone,
    but for `data`, which the sampler fills ahead of `filled`.
    """

    def __init__(self, head: bytes, length: int) -> None:
        self.head, self.length = head, length
        self.data = bytearray(head)  # the rest takes memory only once its turn has come
        self.filled = len(head)
        self.sha256: bytes | None = None
        self._digest: str | None = None
        self.tier: str | None = None
        self.error: BaseException | None = None
        self.readers = 0
        self.stop: Callable[[], None] | None = None
        self.admitted = self.abandoned = False
        self._served = False
        self._grown = asyncio.Event()

    @property
    def repr_digest(self) -> str | None:
        """The Repr-Digest field (RFC 9530) once all bytes exist."""
        if self._digest is None and self.sha256:
            self._digest = f"sha-256=:{base64.b64encode(self.sha256).decode()}:"
        return self._digest

    def begin(self) -> memoryview:
        """The space for all bytes, the head in place."""
        data = bytearray(self.length)
        data[: len(self.head)] = self.head
        self.data = data
        return memoryview(data)

    def settle(self, tier: str) -> None:
        """Where the body comes from is known, if it was not already."""
        if self.tier is None:
            self.tier = tier
            self._wake()

    async def settled(self) -> str:
        """Where the body comes from. Raises Busy, or RuntimeError if that failed."""
        while self.tier is None:
            if isinstance(self.error, Busy):
                raise Busy(*self.error.args)
            if self.error is not None:
                raise RuntimeError("the lookup failed") from self.error
            await self._grown.wait()
        return self.tier

    def advance(self, filled: int) -> None:
        """The first `filled` bytes are there: wake the readers."""
        self.filled = filled
        self._wake()

    def fail(self, error: BaseException) -> None:
        """No more bytes will come."""
        self.error = error
        self._wake()

    async def whole(self) -> None:
        """Wait until all bytes and their digest exist. Raises RuntimeError if they never will."""
        while self.filled < self.length or self.sha256 is None:
            if self.error is not None:
                raise RuntimeError("the materialization failed") from self.error
            await self._grown.wait()

    def _wake(self) -> None:
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    def leave(self) -> None:
        """Every `Cache.get` is answered by one of these. The last reader to leave stops the making,
        unless a reader already got all it asked for: it may come back for another range."""
        self.readers -= 1
        done = self._served or self.filled == self.length or self.error is not None
        if self.readers == 0 and not done and self.stop is not None:
            self.stop()

    async def read(self, start: int, stop: int) -> AsyncIterator[memoryview]:
        """Bytes [start, stop) in chunks of at most 256 KiB, uncopied, as they come to exist.

        Raises RuntimeError if the file could not be finished.
        """
        at = start
        while at < stop:
            if at < self.filled:
                end = min(stop, at + CHUNK, self.filled)
                yield memoryview(self.data).toreadonly()[at:end]
                at = end
            elif self.error is not None:
                raise RuntimeError("the materialization failed") from self.error
            else:
                await self._grown.wait()
        self._served = True


class Cache:
    """Finished bodies, least recently used first, and the flights that fetch or make new ones.

    The finished bodies are at most `max_bytes`, those being made at most `max_flights`, of which
    `samplers` run at once; `prepare` runs first in each sampler's thread.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        samplers: int = 1,
        max_flights: int = 64,
        prepare: Callable[[], None] | None = None,
        shared: Shared | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.max_bytes, self.max_flights, self.bytes = max_bytes, max_flights, 0
        self.shared, self.metrics = shared, metrics or Metrics()
        self.finished: OrderedDict[str, Body] = OrderedDict()
        self.flights: dict[str, Body] = {}
        self.making = 0
        # A digest outlives its body: a client may ask for it after the bytes were dropped.
        self.digests: OrderedDict[str, str] = OrderedDict()
        self._leases: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        # torch runs here, off the event loop and out of the shared thread pool.
        self._pool = ThreadPoolExecutor(samplers, "sampler", initializer=prepare)

    async def get(
        self, key: str, head: bytes, length: int, produce: Callable[[], Iterator[bytes]]
    ) -> tuple[Body, str]:
        """The body of `key` and where it comes from: 'memory', 'coalesced', 'redis' or 'computed'.

        `produce` makes what follows `head`; it runs in a sampler's thread. Whoever got a body says
        `leave` when done with it. Waits for the shared tier's answer only. Raises Busy.
        """
        body = self.finished.get(key) or self.flights.get(key)
        if key in self.finished:
            self.finished.move_to_end(key)
        if body is not None and body.filled == body.length:  # or it is being stored
            body.readers += 1
            return body, "memory"
        self.metrics.misses.labels("memory").inc()
        joined = body is not None
        if body is None:
            body = Body(head, length)
            if self.shared is None:
                self._admit(body, "computed")
            self.flights[key] = body
            # The task is the cache's own: only the last client to leave stops it.
            task = self._spawn(self._fly(key, body, produce))
            body.stop = partial(self._abandon, key, body, task)
        body.readers += 1
        try:
            tier = body.tier or await body.settled()
        except BaseException:
            body.leave()
            raise
        return body, "coalesced" if joined else tier

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _abandon(self, key: str, body: Body, task: asyncio.Task[None]) -> None:
        """Stop a flight nobody waits for; who comes next starts another at once."""
        body.abandoned = True
        if self.flights.get(key) is body:
            del self.flights[key]
        task.cancel()

    def _admit(self, body: Body, tier: str) -> None:
        """Count a body among those being made. Raises Busy."""
        if body.tier is None:
            if self.making >= self.max_flights:
                raise Busy(f"{self.making} bodies are being made")
            self.making += 1
            body.admitted = True
            body.settle(tier)

    def _dismiss(self, body: Body) -> None:
        self.making -= body.admitted
        body.admitted = False

    async def _fly(self, key: str, body: Body, produce: Callable[[], Iterator[bytes]]) -> None:
        try:
            async with self._turn(key, body) as found:
                if found:
                    body.data, body.sha256 = found
                else:
                    self._admit(body, "computed")
                    body.sha256 = await self._sample(body, produce)
                self._keep(key, body)
                body.settle("redis")
                body.advance(body.length)
                self._dismiss(body)
                if self.shared is not None and not found:
                    began = time.perf_counter()
                    await self.shared.put(key, body.data, body.sha256)
                    self.metrics.sampling.labels("store").observe(time.perf_counter() - began)
        except asyncio.CancelledError:
            self.metrics.cancelled.inc()
            body.fail(Abandoned("every reader left"))
        except Busy as error:
            body.fail(error)
        except Exception as error:
            log.exception("materialization %s failed", key)
            body.fail(error)
        finally:
            self._dismiss(body)
            body.stop = None
            if self.flights.get(key) is body:
                del self.flights[key]

    @contextlib.asynccontextmanager
    async def _turn(self, key: str, body: Body) -> AsyncIterator[Found | None]:
        """What the shared tier has; or None, when it is for this replica to make the body."""
        if self.shared is None:
            yield None
            return
        token = secrets.token_hex(16)
        renewing = None
        try:
            found, held = await self._ask(self.shared, key, body, token)
            if held and not found:
                renewing = self._spawn(self._renew(self.shared, key, token))
            yield found
        finally:
            if renewing:
                renewing.cancel()
            # Even if it was never seen to be won: this task may have been cancelled while the answer
            # was under way. That is also why a task of its own releases it.
            if token in self._leases:
                self._leases.discard(token)
                self._spawn(self.shared.release(key, token))

    async def _ask(
        self, shared: Shared, key: str, body: Body, token: str
    ) -> tuple[Found | None, bool]:
        """What the shared tier has, now or once another replica made it; and whether `token` holds
        the lease. Neither, if the tier is away or the others took too long."""
        outcome = self.metrics.lease.labels
        try:
            if found := await shared.get(key, body.head, body.length):
                return found, False
        except Away:
            return None, False
        self.metrics.misses.labels("redis").inc()
        self._leases.add(token)
        try:
            pause, patience = POLL[0], time.monotonic() + LEASES * shared.lease_seconds
            while not await shared.lease(key, token):
                self._admit(body, "coalesced")
                if time.monotonic() > patience:
                    outcome("expired").inc()
                    return None, False
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
                pause = min(1.5 * pause, POLL[1])
                if found := await shared.get(key, body.head, body.length):
                    outcome("waited").inc()
                    return found, False
            # The last holder may have stored it and let go since this one looked.
            found = await shared.get(key, body.head, body.length)
            outcome("waited" if found else "expired" if body.tier else "won").inc()
            return found, True
        except Away:
            outcome("failed").inc()
            return None, False

    async def _renew(self, shared: Shared, key: str, token: str) -> None:
        """Hold the lease for as long as the process lives: sampling may take longer than a lease."""
        while True:
            await asyncio.sleep(shared.lease_seconds / 3)
            await shared.renew(key, token)

    async def _sample(self, body: Body, produce: Callable[[], Iterator[bytes]]) -> bytes:
        """Fill the body in a sampler's thread. Returns its sha256."""
        loop, metrics, asked = asyncio.get_running_loop(), self.metrics, time.perf_counter()

        def run() -> bytes:
            began = time.perf_counter()
            metrics.queue.dec()
            metrics.sampling.labels("queue").observe(began - asked)
            try:
                digest = fill()
            except Abandoned:
                raise
            except BaseException:
                metrics.failures.inc()
                raise
            metrics.sampling.labels("sample").observe(time.perf_counter() - began)
            return digest

        def fill() -> bytes:
            digest, at, space = hashlib.sha256(body.head), len(body.head), body.begin()
            for chunk in produce():
                end = at + len(chunk)
                if end > body.length:
                    raise ValueError(f"more than the {body.length} bytes that were planned")
                space[at:end] = chunk
                digest.update(chunk)
                at = end
                if at < body.length:  # the last byte waits until its digest can be asked for
                    if body.abandoned:
                        raise Abandoned
                    loop.call_soon_threadsafe(body.advance, at)
            if at != body.length:
                raise ValueError(f"{at} bytes where {body.length} were planned")
            return digest.digest()

        metrics.queue.inc()
        future = self._pool.submit(run)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if future.cancel():  # it had not begun
                metrics.queue.dec()
            raise

    def _keep(self, key: str, body: Body) -> None:
        assert body.repr_digest is not None
        self.digests[key] = body.repr_digest
        self.digests.move_to_end(key)
        if len(self.digests) > DIGESTS:
            self.digests.popitem(last=False)
        if body.length > self.max_bytes or key in self.finished:
            return
        self.finished[key] = body
        self.bytes += body.length
        while self.bytes > self.max_bytes:
            _, old = self.finished.popitem(last=False)
            self.bytes -= old.length

    async def close(self) -> None:
        """Wait for the flights under way and stop the samplers."""
        while self._tasks:
            await asyncio.wait(self._tasks)
        self._pool.shutdown()
