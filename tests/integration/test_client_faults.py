"""Real client processes against a real service: killed at any moment, several at once."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

from neumeta import pull as client
from tests.test_pull import files


def command(url: str, out: Path) -> list[str]:
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
    return [sys.executable, "-m", "neumeta.command", *asked]


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends one body slowly, by honest ranges, and notes where each began."""

    body = b""
    promised = ""
    began: list[int] = []
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/plan/"):  # as a mirror that has files alone
            self.send_error(404)
            return
        kind = type(self)
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        kind.began.append(first)
        rest = kind.body[first:]
        self.send_response(206 if first else 200)
        if first:
            extent = f"bytes {first}-{len(kind.body) - 1}/{len(kind.body)}"
            self.send_header("Content-Range", extent)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", '"tag"')
        self.send_header("Repr-Digest", kind.promised)
        self.end_headers()
        for offset in range(0, len(rest), len(kind.body) // 20 + 1):
            part = rest[offset : offset + len(kind.body) // 20 + 1]
            try:
                self.wfile.write(part)
            except OSError:
                return
            time.sleep(0.02)


def test_a_killed_client_leaves_no_bad_file_and_its_successor_resumes(
    url: str, tmp_path: Path
) -> None:
    body = httpx.get(f"{url}/weights/lenet").content
    Slow.body, Slow.began = body, []
    Slow.promised = httpx.head(f"{url}/weights/lenet").headers["repr-digest"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, out = f"http://127.0.0.1:{server.server_port}", tmp_path / "net.safetensors"
    incomplete = tmp_path / f".{out.name}.incomplete"
    chance = random.Random(0)
    try:
        kills = 0
        for _ in range(3):
            before = incomplete.stat().st_size if incomplete.exists() else 0
            process = subprocess.Popen(command(address, out))
            until = time.monotonic() + 30
            while time.monotonic() < until and process.poll() is None:
                if incomplete.exists() and incomplete.stat().st_size > before:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            kills += process.wait(20) == -signal.SIGKILL
            assert not out.exists() or out.read_bytes() == body
        assert kills and incomplete.exists()
        left = incomplete.stat().st_size
        assert subprocess.run(command(address, out), timeout=60).returncode == 0
        assert out.read_bytes() == body and Slow.began[-1] == left > 0
    finally:
        server.shutdown()
        server.server_close()
    assert set(files(tmp_path)) == {out.name, f".{out.name}.pull"}


def test_ctrl_c_is_one_line_and_the_next_pull_goes_on(url: str, tmp_path: Path) -> None:
    Slow.body, Slow.began = httpx.get(f"{url}/weights/lenet").content, []
    Slow.promised = httpx.head(f"{url}/weights/lenet").headers["repr-digest"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, out = f"http://127.0.0.1:{server.server_port}", tmp_path / "net.safetensors"
    incomplete = tmp_path / f".{out.name}.incomplete"
    try:
        process = subprocess.Popen(command(address, out), stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 30
        while time.monotonic() < until and not (incomplete.exists() and incomplete.stat().st_size):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 130 and len(error.strip().splitlines()) == 1, error
        assert "interrupted" in error and not out.exists()
        left = incomplete.stat().st_size
        assert subprocess.run(command(address, out), timeout=60).returncode == 0
        assert out.read_bytes() == Slow.body and Slow.began[-1] == left > 0
    finally:
        server.shutdown()
        server.server_close()


def test_several_processes_pull_one_file(url: str, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pulls = [subprocess.Popen(command(url, out), env=env, stdout=-1, text=True) for _ in range(4)]
    told = [process.communicate(timeout=60)[0] for process in pulls]
    assert [process.returncode for process in pulls] == [0] * 4 and len(set(told)) == 1
    assert hashlib.sha256(out.read_bytes()).hexdigest() in told[0]
    assert set(files(tmp_path)) == {out.name, f".{out.name}.pull"}


def test_the_same_pull_in_an_event_loop(url: str, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    digest = asyncio.run(client.apull(url, "lenet", out, parameters={"width": "0.5"}))
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
