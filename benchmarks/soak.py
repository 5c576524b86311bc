"""A service under mixed load with faults injected: does it stay what it was?

    python -m benchmarks.soak --minutes 30

One service with a small memory tier and a real Redis. Every second some clients ask for random widths,
dtypes and ranges, some leave in the middle, some send nonsense; every half a minute Redis is stopped,
killed or filled with damaged values; every few minutes the manifolds are reloaded. Every whole answer's
bytes are compared with the first ones of the same ETag. Memory and descriptors at the start (after a
minute of warm-up) and at the end. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.local import RedisServer, fetch, hardware, replicas

MODELS = Path(__file__).parent.parent / "models"
NONSENSE = (
    "/weights/resnet20?width=nan",
    "/weights/resnet20?width=1e999",
    "/weights/nobody",
    "/weights/resnet20?width=0.5&width=0.5",
    "/weights/resnet20?depth=0",
    "/nowhere",
)


def standing(pid: int) -> tuple[int, int]:
    """Resident bytes and open descriptors of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def leave(port: int, path: str) -> None:
    """Read a little of an answer, then hang up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.read(1024)
    writer.transport.abort()


class Soak:
    """The clients, and what they have seen."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.random = port, random.Random(seed)
        self.known: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        self.slowest = 0.0

    def path(self) -> str:
        """A file to ask for: mostly a few popular ones, sometimes any."""
        arch = self.random.choice(("resnet20", "resnet20", "lenet", "resnet-mnist"))
        if arch == "resnet-mnist":
            depth = [self.random.randint(1, 9) for _ in range(2)]
            return f"/weights/{arch}?depth={depth[0]},{depth[1]}&extrapolate=true"
        popular = self.random.random() < 0.7
        width = self.random.choice((0.25, 0.5, 1.0)) if popular else self.random.uniform(0.25, 1)
        dtype = self.random.choice(("float32", "float16"))
        return f"/weights/{arch}?width={width}&dtype={dtype}"

    async def client(self) -> None:
        """One client's visit."""
        kind = self.random.random()
        try:
            if kind < 0.05:
                await leave(self.port, self.path())
                self.seen["left"] += 1
            elif kind < 0.15:
                answer = await fetch(self.port, self.random.choice(NONSENSE))
                self.seen["refused" if 400 <= answer.status < 500 else "WRONG"] += 1
            else:
                answer = await fetch(self.port, self.path())
                etag = answer.headers.get("etag", "")
                right = answer.status == 200
                right = right and self.known.setdefault(etag, answer.sha256) == answer.sha256
                self.seen["whole" if right else f"WRONG {answer.status}"] += 1
                self.slowest = max(self.slowest, answer.seconds)
        except (OSError, EOFError) as error:
            self.seen[f"ERROR {type(error).__name__}"] += 1


async def disturb(redis: RedisServer, service: int, chance: random.Random, until: float) -> int:
    """Redis stopped, killed or full of damage, and reloads, until the end; how many of them."""
    count = 0
    while time.monotonic() < until - 40:
        await asyncio.sleep(15)
        fault = chance.choice(("stop", "kill", "damage", "reload"))
        count += 1
        if fault == "stop":
            redis.signal(signal.SIGSTOP)
            await asyncio.sleep(10)
            redis.signal(signal.SIGCONT)
        elif fault == "kill":
            redis.kill()
            await asyncio.sleep(5)
            redis.start()
        elif fault == "damage":
            script = "for _, k in ipairs(redis.call('KEYS', 'neumeta:*')) do "
            script += "redis.call('SETRANGE', k, 200, 'damaged') end"
            command = ["redis-cli", "-p", str(redis.port), "EVAL", script, "0"]
            with contextlib.suppress(OSError):
                subprocess.run(command, capture_output=True, timeout=5, check=False)
        else:
            os.kill(service, signal.SIGHUP)
    return count


async def soak(models: Path, minutes: float, rate: float, seed: int) -> dict[str, object]:
    """The whole run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        redis = RedisServer(
            Path(folder), "--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru"
        )
        stack.callback(redis.kill)
        flags = ("--redis-url", redis.url, "--cache-bytes", str(4 << 20))
        (service,) = stack.enter_context(replicas(1, models, *flags))
        pid, until = service.process.pid, time.monotonic() + 60 * minutes
        clients, visits = Soak(service.port, seed), set()
        faults = asyncio.create_task(disturb(redis, pid, random.Random(seed), until))
        warm = time.monotonic() + min(60, 15 * minutes)
        start: tuple[int, int] | None = None
        told = time.monotonic()
        while time.monotonic() < until:
            visit = asyncio.create_task(clients.client())
            visits.add(visit)
            visit.add_done_callback(visits.discard)
            await asyncio.sleep(clients.random.expovariate(rate))
            if start is None and time.monotonic() > warm:
                start = standing(pid)
            if time.monotonic() > told + 60:
                told = time.monotonic()
                print(dict(clients.seen), standing(pid), flush=True)
        await asyncio.gather(*visits)
        count = await faults
        await asyncio.sleep(3)
        end = standing(pid)
        wrong = sum(n for name, n in clients.seen.items() if name.startswith(("WRONG", "ERROR")))
        assert start
        return {
            "hardware": hardware(),
            "minutes": minutes,
            "answers": dict(clients.seen),
            "wrong_or_failed": wrong,
            "files": len(clients.known),
            "faults": count,
            "slowest_seconds": round(clients.slowest, 2),
            "resident_mb_start_end": [round(each[0] / 1e6, 1) for each in (start, end)],
            "descriptors_start_end": [start[1], end[1]],
            "failures": await service.metric("neumeta_sampling_failures_total"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=20, help="visits per second")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print(json.dumps(asyncio.run(soak(asked.models, asked.minutes, asked.rate, asked.seed))))


if __name__ == "__main__":
    main()
