"""Real parts on this machine, for benchmarks and tests: a Redis, replicas, and a bare HTTP client.

Knows no benchmark. Whatever it starts it stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

SAMPLED = 'neumeta_sampling_seconds_count{stage="sample"}'


def free_port() -> int:
    """A TCP port that nobody listens on, low enough for a cluster's bus at 10,000 above it."""
    while True:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = int(taken.getsockname()[1])
        if port <= 55_000:
            return port


def hardware() -> str:
    """The processor and how many of it, for a result's last line."""
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


class RedisServer:
    """A redis-server on a free port, which can be killed, stopped and started again there."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, and wait until it listens."""
        found = shutil.which("redis-server")
        assert found, "redis-server is not installed"
        command = [found, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        port = () if "--tls-port" in self.options else ("--port", str(self.port))
        options = [option.format(port=self.port) for option in self.options]
        self.process = subprocess.Popen([*command, *port, *options], stdout=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        self.kill()
        raise AssertionError("redis-server did not start")

    def signal(self, number: signal.Signals) -> None:
        """Stop it in its tracks, or let it go on."""
        assert self.process
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


class Service:
    """One service process with its real uvicorn on a free port, until `stop` or the block ends.

    `code` is the folder of another version whose code it runs.
    """

    def __init__(
        self,
        models: Path,
        *flags: str,
        stderr: int = subprocess.DEVNULL,
        code: Path | None = None,
    ) -> None:
        command = [sys.executable, "-m", "service.cli", "--models", str(models), "--port", "0"]
        # Nothing sends it requests once it is stopped: without that wait, where it may be said.
        command += ["--log-level", "warning", *([] if code else ["--drain-seconds", "0"]), *flags]
        environment = {**os.environ, "PYTHONPATH": str(code)} if code else None
        self.process = subprocess.Popen(
            command, cwd=code, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True
        )

    @cached_property
    def port(self) -> int:
        """Where it listens; the first to ask waits until it does."""
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                if found := re.search(r"curl .*http://[\d.]+:(\d+)/weights", line):
                    return int(found.group(1))
        self.process.kill()
        self.process.wait()
        raise AssertionError("the service did not start")

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    async def metric(self, name: str) -> float:
        """One value of its /metrics."""
        answer = await fetch(self.port, "/metrics")
        found = re.search(rf"^{re.escape(name)} (\S+)$", answer.body.decode(), re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def memory(self) -> int:
        """Resident bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Terminate; the exit code."""
        self.process.terminate()
        return self.process.wait(40)

    def __enter__(self) -> Self:
        assert self.port
        return self

    def __exit__(self, *why: object) -> None:
        self.stop()


@contextlib.contextmanager
def replicas(count: int, models: Path, *flags: str) -> Iterator[list[Service]]:
    """`count` services, started together, until the block ends."""
    started = [Service(models, *flags) for _ in range(count)]
    try:
        assert all(service.port for service in started)
        yield started
    finally:
        for service in started:
            service.process.terminate()
        for service in started:
            service.stop()


@dataclass
class Answer:
    """What came back, and the seconds to its headers and to its last byte."""

    status: int
    headers: dict[str, str]
    body: bytes
    first: float
    seconds: float

    @property
    def sha256(self) -> str:
        """Of the body."""
        return hashlib.sha256(self.body).hexdigest()


async def fetch(port: int, path: str) -> Answer:
    """One GET on a connection of its own. Raises OSError or EOFError if the answer is not whole."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        first = time.perf_counter() - began
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        body = await reader.readexactly(int(headers["content-length"]))
        status = int(head[0].split()[1])
        return Answer(status, headers, body, first, time.perf_counter() - began)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
