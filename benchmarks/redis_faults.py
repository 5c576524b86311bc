"""Steady load while Redis is killed, restarted, stopped (SIGSTOP) and filled: who notices?

    python -m benchmarks.redis_faults

One replica without a memory tier, so that every request asks Redis; 27 small sizes of a manifold of
random parameters; requests start at a fixed rate, each on a connection of its own. "Added" latency
while Redis hangs is that of requests that began between SIGSTOP and the opening of the circuit, less
the median with Redis dead: those also sample. To the first byte it is the wait for Redis alone; to
the last, requests that were held up together also wait for one another's sampling.
Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
import time
from itertools import count, product
from pathlib import Path

from redis.asyncio import Redis

from benchmarks.local import Answer, RedisServer, Service, fetch, hardware, replicas
from benchmarks.manifolds import served
from neumeta import checkpoint
from neumeta.space import Space

OPEN = "neumeta_circuit_open"
SIZES = 27


class Load:
    """Requests at a fixed rate, whatever becomes of them; each has the time it began."""

    def __init__(self, port: int, rate: float, widths: list[str]) -> None:
        self.port, self.rate, self.widths = port, rate, widths
        self.rows: list[tuple[float, Answer | BaseException]] = []
        self.ending = False

    async def one(self, number: int) -> None:
        began = time.monotonic()
        try:
            path = f"/weights/lenet?width={self.widths[number % len(self.widths)]}"
            found: Answer | BaseException = await fetch(self.port, path)
        except (OSError, EOFError) as error:
            found = error
        self.rows.append((began, found))

    async def run(self) -> None:
        number, due = 0, time.monotonic()
        async with asyncio.TaskGroup() as group:
            while not self.ending:
                group.create_task(self.one(number))
                number, due = number + 1, due + 1 / self.rate
                await asyncio.sleep(max(0, due - time.monotonic()))

    def summary(self, *spans: tuple[float, float]) -> dict[str, object]:
        rows = [row for at, row in self.rows if any(a <= at < b for a, b in spans)]
        good = [row for row in rows if isinstance(row, Answer) and row.status == 200]
        times = sorted(1000 * row.seconds for row in good)
        tiers = [row.headers["x-neumeta-cache"] for row in good]
        found: dict[str, float] = {"requests": len(rows), "failed": len(rows) - len(good)}
        first = sorted(1000 * row.first for row in good)
        if good:
            found["p50_ms"] = round(times[len(times) // 2], 1)
            found["p99_ms"] = round(times[int(0.99 * len(times))], 1)
            found["first_p50_ms"] = round(first[len(first) // 2], 1)
            found["first_p99_ms"] = round(first[int(0.99 * len(first))], 1)
        return {**found, "tiers": {tier: tiers.count(tier) for tier in sorted(set(tiers))}}


def smallest(space: Space) -> list[str]:
    """Widths of different small files, as a query has them."""
    low = space.width[0]
    for size in count(2):
        steps = [low + step / 64 for step in range(size)]
        mixed = product(steps, repeat=len(space.groups))
        by_key = {space.architecture(factors).key: factors for factors in mixed}
        if len(by_key) >= SIZES:
            return [",".join(map(str, factors)) for factors in list(by_key.values())[:SIZES]]
    raise AssertionError


async def until(replica: Service, value: float, seconds: float = 10) -> float:
    """When the circuit's state became `value`."""
    limit = time.monotonic() + seconds
    while await replica.metric(OPEN) != value:
        assert time.monotonic() < limit, f"{OPEN} is not {value} after {seconds} s"
        await asyncio.sleep(0.05)  # scraping is work too, and for the same process
    return time.monotonic()


async def faults(
    replica: Service,
    redis: RedisServer,
    widths: list[str],
    rate: float,
    hang: float,
    hangs: int,
) -> dict[str, object]:
    load, found = Load(replica.port, rate, widths), {}
    running = asyncio.create_task(load.run())

    async def lasting(name: str, seconds: float) -> None:
        began = time.monotonic()
        await asyncio.sleep(seconds)
        found[name] = load.summary((began, time.monotonic()))
        print(name, found[name], flush=True)

    await asyncio.sleep(2)  # warm: every size is in Redis
    await lasting("redis", 5)
    redis.kill()
    await until(replica, 1)
    await lasting("killed", 5)
    redis.start()
    await until(replica, 0)
    await asyncio.sleep(2)
    await lasting("restarted", 5)
    redis.signal(signal.SIGSTOP)
    began = time.monotonic()
    await until(replica, 1)
    spans = [(began, time.monotonic())]
    await lasting("stopped", hang)
    redis.signal(signal.SIGCONT)
    await until(replica, 0)
    await lasting("continued", 3)
    # Between the stop and the opening of the circuit only some requests fit: stop it often.
    for _ in range(hangs - 1):
        redis.signal(signal.SIGSTOP)
        began = time.monotonic()
        spans.append((began, await until(replica, 1)))
        await asyncio.sleep(0.5)  # whoever asked before must not be answered after all
        redis.signal(signal.SIGCONT)
        await until(replica, 0)
        await asyncio.sleep(0.3)
    async with Redis.from_url(redis.url) as raw:
        await raw.flushall()
        await raw.config_set("maxmemory-policy", "noeviction")
        await raw.config_set("maxmemory", 1 << 16)
    await lasting("full_noeviction", 5)
    async with Redis.from_url(redis.url) as raw:
        await raw.config_set("maxmemory-policy", "allkeys-lru")
        await raw.config_set("maxmemory", (await raw.info("memory"))["used_memory"] + (1 << 20))
    await lasting("full_allkeys_lru", 5)
    load.ending = True
    await running
    before = load.summary(*spans)
    dead = found["killed"]
    total = load.summary((0, float("inf")))
    return {
        **found,
        "before_the_circuit_opens": {"hangs": hangs, **before},
        "added_p99_ms_before_the_circuit_opens": {
            "first_byte": round(before["first_p99_ms"] - dead["first_p50_ms"], 1),
            "last_byte": round(before["p99_ms"] - dead["p50_ms"], 1),
        },
        "total": {"requests": total["requests"], "failed": total["failed"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=30, help="requests a second")
    parser.add_argument("--hang", type=float, default=30, help="seconds of SIGSTOP")
    parser.add_argument("--hangs", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "lenet.safetensors"
        manifold = served()
        checkpoint.write(manifold, models)
        redis = RedisServer(Path(folder))
        flags = ("--redis-url", redis.url, "--cache-bytes", "0", "--redis-pause", "1")
        try:
            with replicas(1, models, *flags) as (replica,):
                asked_for = (smallest(manifold.space), asked.rate, asked.hang, asked.hangs)
                found = asyncio.run(faults(replica, redis, *asked_for))
        finally:
            if redis.process:
                redis.signal(signal.SIGCONT)
            redis.kill()
    about = {"benchmark": "redis_faults", "hardware": hardware(), "rate": asked.rate}
    print(json.dumps({**about, "hang_seconds": asked.hang, **found}))


if __name__ == "__main__":
    main()
