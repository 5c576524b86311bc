"""A thousand cold requests for one key, at two replicas and one real Redis: who makes the body?

    python -m benchmarks.herd

First undisturbed: exactly 1 materialization, equal bytes. Then the replica that holds the lease is
killed (SIGKILL) while it samples: at most 2, and no error at the other. The manifold has random
parameters; K makes its sampling long enough to be killed in. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from benchmarks.local import SAMPLED, Answer, RedisServer, Service, fetch, hardware, replicas
from benchmarks.manifolds import served
from neumeta import checkpoint

WON = 'neumeta_lease_total{outcome="won"}'


async def herd(ports: list[int], path: str, count: int) -> list[Answer | BaseException]:
    asked = (fetch(ports[number % len(ports)], path) for number in range(count))
    return await asyncio.gather(*asked, return_exceptions=True)


def report(answers: list[Answer | BaseException]) -> dict[str, object]:
    good = [each for each in answers if isinstance(each, Answer) and each.status == 200]
    tiers = [each.headers["x-neumeta-cache"] for each in good]
    return {
        "requests": len(answers),
        "ok": len(good),
        "failed": len(answers) - len(good),
        "distinct_sha256": len({each.sha256 for each in good}),
        "tiers": {tier: tiers.count(tier) for tier in sorted(set(tiers))},
        "slowest_seconds": round(max((each.seconds for each in good), default=0), 3),
    }


async def cold(pair: list[Service], count: int, samples: int) -> dict[str, object]:
    began = time.perf_counter()
    path = f"/weights/lenet?samples={samples}"
    answers = await herd([each.port for each in pair], path, count)
    seconds = time.perf_counter() - began
    made = [await each.metric(SAMPLED) for each in pair]
    return {"materializations": sum(made), "seconds": round(seconds, 3), **report(answers)}


async def killed(pair: list[Service], count: int, samples: int) -> dict[str, object]:
    path = f"/weights/lenet?samples={samples}"
    halves = [asyncio.create_task(herd([each.port], path, count // 2)) for each in pair]
    while not any(holders := [await each.metric(WON) for each in pair]):
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    holder = holders.index(1)
    begun = await pair[holder].metric('neumeta_sampling_seconds_count{stage="queue"}')
    finished = await pair[holder].metric(SAMPLED)
    pair[holder].kill()
    answers = await halves[1 - holder]
    await halves[holder]
    other = await pair[1 - holder].metric(SAMPLED)
    return {
        "killed_mid_sampling": begun == 1 and finished == 0,
        "materializations": begun + other,
        "survivor": report(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--slow-samples", type=int, default=2000)
    asked = parser.parse_args()
    result: dict[str, object] = {"benchmark": "herd", "hardware": hardware()}
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "lenet.safetensors"
        checkpoint.write(served(), models)
        for name, run, samples in (
            ("cold", cold, asked.samples),
            ("holder_killed", killed, asked.slow_samples),
        ):
            redis = RedisServer(Path(folder))
            try:
                flags = (
                    "--redis-url",
                    redis.url,
                    "--max-samples",
                    "100" if name == "cold" else "4096",
                )
                with replicas(2, models, *flags) as pair:
                    result[name] = asyncio.run(run(pair, asked.requests, samples))
            finally:
                redis.kill()
            print(name, result[name], flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
