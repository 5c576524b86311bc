"""Cached files per second, beside a bare uvicorn application that sends the same bytes from memory.

    python -m benchmarks.serve    # resnet20 at width 0.5; needs wrk, and redis-server for its tier

Each round measures the bare application, the in-process tier and the Redis tier (a service without a
memory tier) one after the other with wrk; medians of the rounds, and the ratio to the bare one in the
same run. Every answer has the same body. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.local import RedisServer, free_port, hardware

BARE = """
import sys, uvicorn
body = open(sys.argv[2], "rb").read()
headers = [(b"content-type", b"application/vnd.safetensors"), (b"content-length", b"%d" % len(body))]
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", access_log=False, lifespan="off")
"""


@contextlib.contextmanager
def process(command: list[str], url: str, core: int, **environment: str) -> Iterator[None]:
    """A server on one core, ready to answer `url`."""
    pinned = ["taskset", "-c", str(core), *command] if shutil.which("taskset") else command
    server = subprocess.Popen(
        pinned,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
                break
            if server.poll() is not None:
                raise SystemExit(f"{command[0]} did not start")
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(0.1)
        yield
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()


def per_second(url: str, seconds: int, connections: int, core: int) -> float:
    """Answers per second; raises if any was not a 200."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", url]
    if shutil.which("taskset"):
        command = ["taskset", "-c", str(core), *command]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in told or "Socket errors" in told:
        raise SystemExit(told)
    found = re.search(r"Requests/sec:\s+([\d.]+)", told)
    assert found, told
    return float(found.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", default="/weights/resnet20?width=0.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--log-level", default="info")
    asked = parser.parse_args()
    server_core, wrk_core = 0, (os.cpu_count() or 1) - 1
    service = [sys.executable, "-m", "service.cli", "--log-level", asked.log_level]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ports = {name: free_port() for name in ("bare", "memory", "redis")}
        url = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        command = [*service, "--port", str(ports["memory"])]
        stack.enter_context(process(command, f"{url['memory']}/livez", server_core))
        body = urllib.request.urlopen(url["memory"] + asked.path).read()
        kept = Path(folder) / "body"
        kept.write_bytes(body)
        bare = [sys.executable, "-c", BARE, str(ports["bare"]), str(kept)]
        stack.enter_context(process(bare, url["bare"], server_core))
        paths = {"bare": "/", "memory": asked.path}
        if shutil.which("redis-server"):
            redis = RedisServer(Path(folder))
            stack.callback(redis.kill)
            command = [*service, "--port", str(ports["redis"]), "--cache-bytes", "0"]
            alive = f"{url['redis']}/livez"
            environment = {"NEUMETA_REDIS_URL": redis.url}
            stack.enter_context(process(command, alive, server_core, **environment))
            paths["redis"] = asked.path
        sha = hashlib.sha256(body).hexdigest()
        for name, path in paths.items():
            for _ in range(3):
                again = urllib.request.urlopen(url[name] + path).read()
                assert hashlib.sha256(again).hexdigest() == sha, name
        rounds: dict[str, list[float]] = {name: [] for name in paths}
        for number in range(asked.rounds):
            for name, path in paths.items():
                arguments = (asked.seconds, asked.connections, wrk_core)
                rounds[name].append(per_second(url[name] + path, *arguments))
            told = {name: round(each[-1], 1) for name, each in rounds.items()}
            print(f"round {number + 1}: {told}", flush=True)
    median = {name: round(statistics.median(each), 1) for name, each in rounds.items()}
    ratio = {name: round(median[name] / median["bare"], 3) for name in paths if name != "bare"}
    report = {
        "hardware": hardware(),
        "bytes": len(body),
        "connections": asked.connections,
        "log_level": asked.log_level,
        "per_second": median,
        "ratio_to_bare": ratio,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
