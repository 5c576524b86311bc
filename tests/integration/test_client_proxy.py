"""The real client and a real service, with a proxy between them that damages what it carries."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.local import Service
from neumeta import pull as client
from neumeta.failure import PullError

PATH = {"width": "0.5"}
Fault = Callable[[bytes, socket.socket], bytes | None]
"""An answer's bytes -> those that are sent instead; None: cut. It may keep the connection waiting."""


def whole(connection: socket.socket) -> bytes:
    """A request with its body, to be the connection's last."""
    asked = b""
    while b"\r\n\r\n" not in asked:
        asked += connection.recv(65536)
    head, _, body = asked.partition(b"\r\n\r\n")
    found = re.search(rb"(?i)content-length: (\d+)", head)
    while found and len(body) < int(found[1]):
        body += connection.recv(65536)
    return re.sub(rb"(?i)connection: [\w-]+", b"Connection: close", head) + b"\r\n\r\n" + body


class Proxy:
    """One request a connection, answered by the service; the first `broken` of them through a fault."""

    def __init__(self, url: str, fault: Fault, broken: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.upstream, self.fault, self.broken = (host, int(port)), fault, broken
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.requests: list[bytes] = []
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listening.accept()
                threading.Thread(target=self.carry, args=(connection,), daemon=True).start()

    def carry(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            asked = whole(connection)
            self.requests.append(asked)
            with socket.create_connection(self.upstream) as server:
                server.sendall(asked)
                answer = b"".join(iter(lambda: server.recv(65536), b""))
            if re.match(rb"(GET|POST) /weights", asked) and self.broken:
                self.broken -= 1
                connection.sendall(self.fault(answer, connection) or b"")
            else:
                connection.sendall(answer)


def flip(answer: bytes, _: socket.socket) -> bytes:
    head, body = answer.split(b"\r\n\r\n", 1)
    body = bytearray(body)
    body[len(body) // 2] ^= 4
    return head + b"\r\n\r\n" + body


def truncate(answer: bytes, _: socket.socket) -> bytes:
    return answer[: len(answer) * 2 // 3]


def stall(answer: bytes, connection: socket.socket) -> None:
    connection.sendall(answer[: len(answer) // 2])
    connection.settimeout(20)
    connection.recv(1)  # until the client has had enough


def whole_for_a_range(answer: bytes, _: socket.socket) -> bytes:
    """First cut, so that a Range is asked for; that is answered by 200 and other bytes."""
    if b" 206 " in answer.split(b"\r\n", 1)[0]:
        head, body = answer.split(b"\r\n\r\n", 1)
        head = re.sub(rb"HTTP/1.1 206[^\r]*", b"HTTP/1.1 200 OK", head)
        return re.sub(rb"(?i)content-range: [^\r]*\r\n", b"", head) + b"\r\n\r\n" + body
    return answer[: len(answer) * 2 // 3]


def longer(answer: bytes, _: socket.socket) -> bytes:
    head, body = answer.split(b"\r\n\r\n", 1)
    length = b"content-length: %d" % (len(body) + 8)
    return re.sub(rb"(?i)content-length: \d+", length, head) + b"\r\n\r\n" + body + b"x" * 8


def wrong_digest(answer: bytes, _: socket.socket) -> bytes:
    return re.sub(rb"sha-256=:....", b"sha-256=:AAAA", answer)


FAULTS = (flip, truncate, stall, whole_for_a_range, longer, wrong_digest)


def pull(proxy: Proxy, out: Path) -> str:
    with httpx.Client(base_url=proxy.url, timeout=1.0) as http:
        return client.pull(
            proxy.url, "lenet", out, parameters=PATH, client=http, sleep=lambda _: None
        )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_that_passes_is_overcome(url: str, tmp_path: Path, fault: Fault) -> None:
    out, good = tmp_path / "net.safetensors", httpx.get(f"{url}/weights/lenet", params=PATH).content
    proxy = Proxy(url, fault, broken=2)
    pull(proxy, out)
    assert out.read_bytes() == good
    # The fault was met, twice, but where the digest that the plan told is enough.
    assert proxy.broken == (fault is wrong_digest)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_that_stays_leaves_the_last_good_file(
    url: str, tmp_path: Path, fault: Fault
) -> None:
    out = tmp_path / "net.safetensors"
    out.write_bytes(b"the last good file")
    with contextlib.suppress(PullError):
        pull(Proxy(url, fault, broken=10**6), out)
        # What only cuts may be overcome piece by piece; then the file is the right one.
        assert out.read_bytes() == httpx.get(f"{url}/weights/lenet", params=PATH).content
        assert fault in (truncate, stall, whole_for_a_range, wrong_digest)
        return
    assert out.read_bytes() == b"the last good file"


def test_the_documents_curl_lines_resume_and_verify(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    (script,) = re.findall(r"```sh\n(.*?)```", (root / "docs/client.md").read_text(), re.DOTALL)
    with Service(root / "models/resnet20-cifar10.safetensors") as service:
        whole = httpx.get(f"{service.url}/weights/resnet20?width=0.5").content
        out = tmp_path / "net.safetensors"

        def run() -> str:
            environment = {**os.environ, "URL": service.url}
            command = ["bash", "-ec", script]
            return subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
            ).stdout

        out.write_bytes(whole[:100_000])  # cut; the rest is asked for
        assert run() == "whole\n" and out.read_bytes() == whole
        damaged = bytearray(whole[:100_000])
        damaged[90_000] ^= 1
        out.write_bytes(damaged)
        assert run() == ""


def test_what_no_digest_vouches_for_is_refused(url: str, tmp_path: Path) -> None:
    def silent(answer: bytes, _: socket.socket) -> bytes:
        # In the header, and in what POST /plan tells, whose length stays.
        answer = answer.replace(b'"repr_digest"', b'"none_digest"')
        return re.sub(rb"(?i)repr-digest: [^\r]*\r\n", b"", answer)

    class Mute(Proxy):
        def carry(self, connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                asked = whole(connection)
                with socket.create_connection(self.upstream) as server:
                    server.sendall(asked)
                    answer = b"".join(iter(lambda: server.recv(65536), b""))
                connection.sendall(silent(answer, connection))

    out = tmp_path / "net.safetensors"
    with pytest.raises(PullError, match="digest"):
        pull(Mute(url, silent, broken=0), out)
    assert not out.exists()
