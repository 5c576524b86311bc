"""Hostile bytes on a real uvicorn's socket: answered with 4xx or a closed connection, never a 5xx,
within a second, without memory that stays; and the service answers the next client."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.local import Service
from neumeta import checkpoint
from tests.conftest import lenet

CACHE_BYTES = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service on a small manifold."""
    path = tmp_path_factory.mktemp("models") / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    with Service(path, "--device", "cpu", "--cache-bytes", str(CACHE_BYTES)) as service:
        yield service


def send(port: int, raw: bytes) -> bytes:
    """What the service answers to these bytes until it closes, or in two seconds."""
    with socket.create_connection(("127.0.0.1", port), 2) as connection:
        answer = b""
        with contextlib.suppress(OSError):  # it may answer and close before it has read all
            connection.sendall(raw)
        with contextlib.suppress(OSError):
            while part := connection.recv(65536):
                answer += part
        return answer


def post(body: bytes, *headers: str, path: str = "/weights") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
    if not any(line.lower().startswith(("content-length", "transfer")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def get(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def chunked(body: bytes, size: int = 4096) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


MILLION = b'{"arch":"lenet","depth":[' + b"3," * 1_000_000 + b"3]}"

HOSTILE: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "2 MB": (post(b'{"arch":"' + b"a" * (2 << 20) + b'"}'), (413,)),
    "2 MB in chunks": (post(chunked(b"a" * (2 << 20)), "Transfer-Encoding: chunked"), (413,)),
    "a million in a list": (post(MILLION), (413,)),
    "a gigabyte promised": (post(b"{", "Content-Length: 1073741824"), (413,)),
    "length of 400 digits": (post(b"{", "Content-Length: " + "9" * 400), (400, 413)),
    "negative length": (post(b"{", "Content-Length: -1"), (400,)),
    "two lengths": (post(b"{}", "Content-Length: 2", "Content-Length: 3"), (400,)),
    "length and chunks": (
        post(chunked(b"{}"), "Content-Length: 2", "Transfer-Encoding: chunked"),
        (400, 422),
    ),
    "bad chunk size": (post(b"zz\r\n{}\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), (400,)),
    "half a body": (post(b'{"arch"', "Content-Length: 100"), ()),
    "width NaN": (post(b'{"arch":"lenet","width":NaN}'), (422,)),
    "width 1e999": (post(b'{"arch":"lenet","width":1e999}'), (422,)),
    "width of 15000 digits": (post(b'{"arch":"lenet","width":' + b"9" * 15_000 + b"}"), (400,)),
    "seed of 4000 digits": (post(b'{"arch":"lenet","seed":' + b"9" * 4000 + b"}"), (400, 422)),
    "deep": (post(b"[" * 16_000), (400,)),
    "deep in a field": (post(b'{"arch":' + b'{"a":' * 2000 + b"1" + b"}" * 2001), (400, 422)),
    "surrogates": (post(b'{"arch":"\\ud800\\udfff\\udc00"}'), (400, 404, 422)),
    "many unknown fields": (
        post(json.dumps({f"f{n}": n for n in range(1000)}).encode()),
        (422,),
    ),
    "null bytes": (post(b"\x00" * 1000), (400,)),
    "gzip": (post(b"\x1f\x8b" + b"\x00" * 100, "Content-Encoding: gzip"), (400,)),
    "multipart": (post(b"--x", "Content-Type: multipart/form-data; boundary=x"), (415,)),
    "latin type": (post(b"{}", "Content-Type: \xff\xfe"), (415,)),
    "body on GET": (get("/weights/lenet", "Content-Length: 2097152") + b"a" * (2 << 20), (413,)),
    "query of 30000": (get("/weights/lenet?width=" + "0.5," * 7500), (422,)),
    "10000 parameters": (get("/weights/lenet?" + "&".join(f"a{n}=1" for n in range(8000))), (422,)),
    "path traversal": (get("/models/../../../../etc/passwd"), (404,)),
    "path traversal, quoted": (get("/weights/..%2f..%2fetc%2fpasswd"), (404,)),
    "a full URL": (get("http://other.example/weights/x"), (404,)),
    "bad quoting": (get("/weights/%zz%"), (404,)),
    "path not UTF-8": (get("/weights/%ff%fe"), (404,)),
    "raw bytes in the path": (b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", (400, 404)),
    "range of digits": (get("/weights/lenet", "Range: bytes=" + "9" * 10_000 + "-"), (200, 206)),
    "range of ranges": (get("/weights/lenet", "Range: bytes=" + "0-1," * 5000), (200,)),
    "range beyond": (get("/weights/lenet", "Range: bytes=999999999999999999-"), (416,)),
    "header of 1 MB": (get("/livez", "X-Big: " + "a" * (1 << 20)), (200, 400, 431)),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50, (400,)),
    "HTTP/9": (b"GET /livez HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n", (200, 400, 505)),
    "smuggled": (post(b"{}GET /metrics HTTP/1.1\r\n\r\n", "Content-Length: 2"), (422,)),
    "method of 1000": (b"A" * 1000 + b" / HTTP/1.1\r\nHost: x\r\n\r\n", (400, 405)),
    "trace": (b"TRACE /weights HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (400, 405)),
    "websocket": (
        get(
            "/weights/lenet",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            "Sec-WebSocket-Version: 13",
        ),
        (200, 400, 403, 404),
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_bytes_get_a_4xx_and_hurt_nobody(server: Service, name: str) -> None:
    port = server.port
    raw, expected = HOSTILE[name]
    answer = send(port, raw)
    statuses = [int(code) for code in re.findall(rb"(?m)^HTTP/1\.1 (\d{3})", answer)]
    final = [code for code in statuses if code >= 200][:1]
    assert tuple(final) == () if not expected else final[0] in expected, answer[:500]
    assert b"Traceback" not in answer and b"/etc/" not in answer.replace(b"/etc/passwd", b"")
    if final and final[0] in (404, 413, 415, 416, 422):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b"content-type: application/problem+json" in head.lower()
        assert len(body) < 2000
    began = time.perf_counter()
    assert httpx.get(f"http://127.0.0.1:{port}/livez").json() == {"status": "live"}
    assert time.perf_counter() - began < 5


def test_a_hundred_rounds_of_it_leave_no_memory_behind(server: Service) -> None:
    port = server.port
    names = [name for name in HOSTILE if name not in ("half a body", "header of 1 MB")]

    def rounds(count: int) -> None:
        for _ in range(count):
            for name in names:
                send(port, HOSTILE[name][0])

    rounds(2)
    before = server.memory()
    rounds(8)
    assert server.memory() - before < 16 << 20
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    assert not re.search(r'neumeta_requests_total\{[^}]*status="5', text)


def test_distinct_widths_in_a_row_stay_within_the_cache(server: Service) -> None:
    port = server.port
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        total = 0
        for step in range(60):
            answer = client.get(f"/weights/lenet?width={0.25 + step / 80}")
            assert answer.status_code == 200
            total += len(answer.content)
            found = re.search(r"(?m)^neumeta_cache_bytes (\S+)", client.get("/metrics").text)
            assert found and float(found.group(1)) <= CACHE_BYTES
        assert float(found.group(1)) > CACHE_BYTES / 2
        assert total > 4 * CACHE_BYTES


def test_a_client_that_leaves_is_no_fault_of_the_service(server: Service) -> None:
    port = server.port
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", port), 2) as connection:
            connection.sendall(post(b'{"arch"', "Content-Length: 100"))
            time.sleep(0.05)
    time.sleep(0.2)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(r'(?m)^neumeta_requests_total\{route="/weights",status="499"\} (\S+)', text)
    assert found and float(found.group(1)) >= 5
    assert 'status="500"' not in text
