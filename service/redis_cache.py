"""The tier that replicas share: Redis, Valkey or a cluster of either. Fails open, within a bound.

Knows no HTTP and no torch, and makes no body. A value is

    32 bytes  the key          a reply that was meant for another request is a miss
     8 bytes  length           big-endian
    32 bytes  sha256           of what follows
    the rest  the body

in one string, so that eviction takes all of it or nothing. It is read in parts: each has a timeout
of its own, and no buffer grows with the body. Values never change, so they need no expiry.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterError, RedisError, ResponseError

from service.cache import Away, Found
from service.metrics import Metrics

PREFIX = 32 + 8 + 32
PART = 2 << 20
TURNS = 25
"""Turns of the event loop a reply gets past its timeout, which may be this process's own lateness."""
FAILURES = 3
"""Failures in a row that open the circuit."""
STORE_SECONDS = 5.0
"""Nobody waits for a store, and 64 MB take a while."""
CONNECTIONS, STORES = 32, 2
QUIET_SECONDS = 60.0
SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}
RELEASE = 'if redis.call("GET", KEYS[1]) == ARGV[1] then return redis.call("DEL", KEYS[1]) end'
RENEW = (
    'if redis.call("GET", KEYS[1]) == ARGV[1] '
    'then return redis.call("PEXPIRE", KEYS[1], ARGV[2]) end'
)

log = logging.getLogger("neumeta")


class RedisCache:
    """The shared tier at one URL: `redis`, `rediss`, `valkey`, `valkeys` or `unix`, and any but the
    last followed by `+cluster`."""

    def __init__(
        self, url: str, *, timeout: float, lease: float, pause: float, metrics: Metrics
    ) -> None:
        """Connects to nothing yet. Raises ValueError for a URL that cannot be one.

        A command is given up after `timeout`; after three in a row Redis is left alone, and pinged
        every `pause` until it answers.
        """
        self.timeout, self.lease_seconds, self.pause, self.metrics = timeout, lease, pause, metrics
        self.open = False
        self._failures, self._told = 0, float("-inf")
        self._probing: asyncio.Task[None] | None = None
        self._late: set[asyncio.Future[Any]] = set()
        self._quick = _client(url, CONNECTIONS, timeout)
        self._stores = _client(url, STORES, STORE_SECONDS)
        self._lock = asyncio.Semaphore(STORES)

    async def get(self, key: str, head: bytes, length: int) -> Found | None:
        """The body of `key`, if it is there and is what it says it is. Raises Away."""
        name, end = f"neumeta:{key}", PREFIX + length
        part: bytes = await self._ask("get", "GETRANGE", name, 0, PART - 1)
        if not part:
            return None
        wanted = bytes.fromhex(key) + length.to_bytes(8, "big")
        if part[:40] == wanted and part[PREFIX : PREFIX + len(head)] == head:
            sha256, digest = part[40:PREFIX], hashlib.sha256()
            body, at = bytearray(length), PREFIX
            part = part[PREFIX:]
            while part and at + len(part) <= end:
                body[at - PREFIX : at - PREFIX + len(part)] = part
                digest.update(part)
                at += len(part)
                if at == end and digest.digest() == sha256:
                    return body, sha256
                # One more byte than there should be, to see what is too long.
                part = await self._ask("get", "GETRANGE", name, at, min(at + PART - 1, end))
        log.warning("redis: %s is damaged, or was evicted while it was read; dropped", name)
        with contextlib.suppress(Away):
            await self._ask("get", "UNLINK", name)
        return None

    async def put(self, key: str, body: bytearray, sha256: bytes) -> None:
        """Keep a finished body; a Redis that is full, slow or gone costs the value and no more."""
        with contextlib.suppress(Away):
            async with self._lock:
                value = b"".join((bytes.fromhex(key), len(body).to_bytes(8, "big"), sha256, body))
                await self._ask("set", "SET", f"neumeta:{key}", value)

    async def lease(self, key: str, token: str) -> bool:
        """Whether `token` now holds the right to make `key`. Raises Away."""
        asked = ("SET", f"neumeta:lease:{key}", token, "NX", "PX", round(1000 * self.lease_seconds))
        return bool(await self._ask("lease", *asked))

    async def renew(self, key: str, token: str) -> None:
        """Hold the lease for as long again, if `token` holds it."""
        name, milliseconds = f"neumeta:lease:{key}", round(1000 * self.lease_seconds)
        with contextlib.suppress(Away):
            await self._ask("lease", "EVAL", RENEW, 1, name, token, milliseconds)

    async def release(self, key: str, token: str) -> None:
        """Delete the lease, if `token` holds it: it may have expired and be another's by now."""
        with contextlib.suppress(Away):
            await self._ask("lease", "EVAL", RELEASE, 1, f"neumeta:lease:{key}", token)

    async def ping(self) -> bool:
        """Whether Redis answers."""
        with contextlib.suppress(Away):
            await self._ask("get", "PING")
            return True
        return False

    async def _ask(self, operation: str, *command: Any, probe: bool = False) -> Any:
        """One command's reply. Raises Away, at once while the circuit is open."""
        if self.open and not probe:
            raise Away("the circuit is open")
        store = operation == "set"
        client, timeout = (self._stores, STORE_SECONDS) if store else (self._quick, self.timeout)
        began = time.perf_counter()
        task = asyncio.ensure_future(client.execute_command(*command))
        try:
            await asyncio.wait({task}, timeout=timeout)
            # A reply that waits only for this process to have a moment is not late.
            for _ in range(TURNS):
                if not task.done():
                    await asyncio.sleep(0)
            if not task.done():
                raise TimeoutError(f"no reply within {timeout:g} s")
            reply = task.result()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.metrics.redis_errors.labels(operation).inc()
            # A refusal (out of memory, no permission) is the answer of a Redis that is there.
            if not isinstance(error, ResponseError) or isinstance(error, ClusterError):
                self._failed(error)
            else:
                self._failures = 0
                if time.monotonic() > self._told + QUIET_SECONDS:
                    self._told = time.monotonic()
                    log.warning("redis: %s refused: %s", command[0], error)
            raise Away(str(error)) from error
        finally:
            self.metrics.redis_seconds.labels(operation).observe(time.perf_counter() - began)
            if not task.done():
                # redis-py closes the connection of a cancelled command, so that its reply is
                # never taken for another's.
                task.cancel()
                self._late.add(task)
                task.add_done_callback(self._forget)
        self._failures = 0
        return reply

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # it was late; what it says is of no interest

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= FAILURES and not self.open:
            self.open = True
            self.metrics.circuit_open.set(1)
            log.warning("redis: left alone after %d failures: %s", self._failures, error)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Ping until Redis answers, then close the circuit: no request pays for finding out."""
        while self.open:
            await asyncio.sleep(self.pause)
            with contextlib.suppress(Away):
                await self._ask("get", "PING", probe=True)
                self.open = False
                self.metrics.circuit_open.set(0)
                log.warning("redis: answers again")

    async def close(self) -> None:
        """Stop probing and close every connection."""
        if self._probing:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        if self._late:
            await asyncio.wait(self._late, timeout=1)
        for client in (self._quick, self._stores):
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()


def _client(url: str, connections: int, timeout: float) -> Any:
    """A client without retries: RedisCache's own timeout decides, long before the socket's."""
    try:
        scheme, _, kind = urlsplit(url).scheme.partition("+")
        if scheme not in SCHEMES or kind not in ("", "cluster") or (kind and scheme == "unix"):
            raise ValueError("its scheme is none of redis, rediss, valkey, valkeys, unix")
        options: dict[str, Any] = {
            "decode_responses": False,
            "max_connections": connections,
            "protocol": 2,
            "retry": Retry(NoBackoff(), 0),
            "socket_connect_timeout": 10 * timeout,
            "socket_keepalive": True,
            "socket_read_size": 1 << 18,
            "socket_timeout": 10 * timeout,
        }
        address = SCHEMES[scheme] + url[url.index(":") :]
        if kind:
            return RedisCluster.from_url(address, require_full_coverage=False, **options)
        pool = BlockingConnectionPool.from_url(address, timeout=timeout, **options)
        return Redis.from_pool(pool)
    except (ValueError, TypeError, RedisError) as error:  # never show the URL: it holds a password
        raise ValueError(f"redis_url: {error}") from None
