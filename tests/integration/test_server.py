"""A real uvicorn on a free port, the real client, and a server that misbehaves on purpose."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from benchmarks.life import manifold
from benchmarks.local import Service
from neumeta import checkpoint, network
from neumeta import pull as client
from neumeta.command import main as neumeta_pull
from neumeta.failure import PullError
from service import cli
from service.app import create_app
from service.connection import Connection
from service.settings import Settings
from tests.conftest import lenet
from tests.test_pull import files
from tests.test_service_edge import endless


def test_pull_gives_a_network_that_runs(url: str, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "net.safetensors"
    digest = client.pull(url, "lenet", out, parameters={"width": "0.5"})
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
    assert network.load(out)(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert set(files(out.parent)) == {out.name, f".{out.name}.pull"}


def test_the_command_says_what_is_wrong_and_keeps_the_last_good_file(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.safetensors"
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
    assert neumeta_pull([*asked, "--width", "7"]) == 2
    assert "width" in capsys.readouterr().err and not out.exists()
    assert neumeta_pull([*asked, "--width", "0.5"]) == 0
    good = out.read_bytes()
    assert neumeta_pull(["--arch", "vgg", "--url", url, "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert "last good file" in told and len(told.strip().splitlines()) == 1
    assert out.read_bytes() == good


def test_a_failure_while_sampling_breaks_the_connection(file: Path) -> None:
    app = create_app(Settings(models=str(file), device="cpu"))
    weights = app.state.engine.weights

    def breaks(job: Any) -> Iterator[bytes]:
        yield next(weights(job))
        raise RuntimeError("out of memory")

    app.state.engine.weights = breaks
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Connection, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{url}/weights/lenet?width=0.5")
        assert httpx.get(f"{url}/livez").status_code == 200
        assert "neumeta_sampling_failures_total 1.0" in httpx.get(f"{url}/metrics").text
    finally:
        server.should_exit = True
        thread.join(30)


def test_a_client_that_hangs_up_stops_the_sampling(tmp_path: Path) -> None:
    path = tmp_path / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    with Service(path, "--max-samples", "4096") as service:
        # Seconds of sampling, of which the client waits for the first byte.
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(timeout=0.5) as hasty,
            hasty.stream("GET", f"{service.url}/weights/lenet?samples=4096") as answer,
        ):
            for _ in answer.iter_bytes():
                pass
        for _ in range(200):
            if "neumeta_sampling_cancelled_total 1.0" in httpx.get(f"{service.url}/metrics").text:
                break
            time.sleep(0.05)
        text = httpx.get(f"{service.url}/metrics").text
        assert "neumeta_sampling_cancelled_total 1.0" in text
        assert 'neumeta_sampling_seconds_count{stage="sample"} 0.0' in text
        assert "neumeta_flights 0.0" in text


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "network", "missing", "no manifold", "endless"]
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    checkpoint.write(lenet(), path)
    raw = path.read_bytes()
    expected = "damaged"
    if damage == "truncated":
        path.write_bytes(raw[:-1000])
    elif damage == "flipped":
        path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:])
        expected = "tensor inr."
    elif damage == "network":
        # A whole, sealed file whose tensors are another network's.
        wrong = lenet()
        wrong.space = manifold("resnet20").space
        checkpoint.write(wrong, path)
        expected = "does not fit resnet20"
    elif damage == "endless":
        checkpoint.write(endless(), path)
        expected = "cannot be sampled: conv1.bias"
    elif damage == "missing":
        path.unlink()
        expected = "neither a file nor a folder"
    else:
        path.write_bytes(b"not a manifold at all" * 100)
        expected = "damaged"
    asked = ["--models", str(path), "--port", "0"]
    if damage == "truncated":  # once as a process, whose start takes two seconds
        command = [sys.executable, "-m", "service.cli", *asked]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
        code, told = ran.returncode, ran.stderr
    else:
        code, told = cli.serve(asked), capsys.readouterr().err
    assert code == 2
    assert expected in told and len(told.strip().splitlines()) == 1, told


class Faulty(BaseHTTPRequestHandler):
    """Serves a good file badly: cuts it short, flips a bit, or ignores the Range."""

    body = b""
    mode = ""
    calls = 0
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("ETag", '"tag"')
        self.end_headers()

    def do_GET(self) -> None:
        kind = type(self)
        kind.calls += 1
        body, start = kind.body, 0
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and kind.mode != "ignores range":
            start = int(asked.group(1))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.send_header("ETag", '"tag"')
        digest = b64encode(hashlib.sha256(body).digest()).decode()
        self.send_header("Repr-Digest", f"sha-256=:{digest}:")
        self.end_headers()
        sent = body[start:]
        if kind.mode in ("cuts", "ignores range") and kind.calls <= 2:
            self.wfile.write(sent[: len(sent) // 2])
            self.close_connection = True
            return
        if kind.mode == "flips":
            sent = sent[:-3] + bytes([sent[-3] ^ 1]) + sent[-2:]
        self.wfile.write(sent)


@pytest.mark.parametrize("mode", ["cuts", "ignores range", "flips"])
def test_a_faulty_server_never_leaves_a_bad_file(url: str, tmp_path: Path, mode: str) -> None:
    good = httpx.get(f"{url}/weights/lenet?width=0.5").content
    Faulty.body, Faulty.mode, Faulty.calls = good, mode, 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    out = tmp_path / "net.safetensors"
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        if mode == "flips":
            with pytest.raises(PullError, match="digest"):
                client.pull(address, "lenet", out, sleep=lambda _: None)
            assert files(tmp_path) == []
        else:
            client.pull(address, "lenet", out, sleep=lambda _: None)
            assert out.read_bytes() == good
            assert Faulty.calls == 3
    finally:
        server.shutdown()
        server.server_close()
