"""The client against a service made for the test: whatever arrives, never a bad file at `out`."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch

from neumeta import network, wire
from neumeta.sample import sample
from service import client
from tests.conftest import lenet

ETAG = '"tag"'


def body_of(dtype: str = "float32", width: float = 0.5) -> bytes:
    manifold = lenet()
    architecture = manifold.space.architecture(width)
    plan = wire.plan(manifold.space, architecture, dtype, manifold.normalisation)
    return b"".join(wire.stream(plan, sample(manifold, architecture, samples=1)))


GOOD = body_of()


def digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


class Parts(httpx.SyncByteStream):
    """A body that breaks off after its parts if `breaks`."""

    def __init__(self, parts: list[bytes], breaks: bool = False) -> None:
        self.parts, self.breaks = parts, breaks

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts
        if self.breaks:
            raise httpx.RemoteProtocolError("peer closed connection")


Handler = Callable[[httpx.Request], httpx.Response]


class Pulled(NamedTuple):
    requests: list[httpx.Request]
    waits: list[float]
    error: Exception | None


def pull(out: Path, *handlers: Handler, retries: int = 4, **parameters: str) -> Pulled:
    """Pull from a service whose n-th request is answered by the n-th handler (then the last)."""
    requests: list[httpx.Request] = []
    waits: list[float] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return handlers[min(len(requests), len(handlers)) - 1](request)

    with httpx.Client(base_url="http://service", transport=httpx.MockTransport(handle)) as http:
        try:
            client.pull(
                "http://service",
                "lenet",
                out,
                parameters=parameters,
                retries=retries,
                client=http,
                sleep=waits.append,
            )
        except (client.PullError, OSError) as error:
            return Pulled(requests, waits, error)
    return Pulled(requests, waits, None)


def answer(
    body: bytes = GOOD,
    *,
    sent: bytes | None = None,
    breaks: bool = False,
    status: int = 200,
    **headers: str,
) -> Handler:
    """A handler that promises `body` and sends `sent`; headers by name, '' to leave one out."""

    def handle(request: httpx.Request) -> httpx.Response:
        told = {
            "content-length": str(len(body)),
            "etag": ETAG,
            "repr-digest": digest(body),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        told = {name: value for name, value in told.items() if value}
        if request.method == "HEAD":
            return httpx.Response(status, headers=told)
        return httpx.Response(
            status, headers=told, stream=Parts([body if sent is None else sent], breaks)
        )

    return handle


def resumed(request: httpx.Request) -> httpx.Response:
    """What an honest service answers to a Range."""
    start = int(request.headers["range"].removeprefix("bytes=").removesuffix("-"))
    told = {
        "content-length": str(len(GOOD) - start),
        "content-range": f"bytes {start}-{len(GOOD) - 1}/{len(GOOD)}",
        "etag": ETAG,
        "repr-digest": digest(GOOD),
    }
    return httpx.Response(206, headers=told, stream=Parts([GOOD[start:]]))


def status(code: int, **headers: str) -> Handler:
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: httpx.Response(code, headers=told, json={"detail": "why it is so"})


def fails(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


def test_a_pulled_file_is_a_network(tmp_path: Path) -> None:
    out = tmp_path / "made" / "net.safetensors"
    assert pull(out, answer()).error is None
    assert out.read_bytes() == GOOD
    assert {path.name for path in out.parent.iterdir()} == {out.name, f".{out.name}.pull"}
    assert network.load(out)(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_a_broken_transfer_continues_where_it_broke(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    pulled = pull(out, answer(sent=GOOD[:1000], breaks=True), resumed)
    assert pulled.error is None and out.read_bytes() == GOOD
    assert pulled.requests[1].headers["range"] == "bytes=1000-"
    assert pulled.requests[1].headers["if-range"] == ETAG


def test_what_arrived_survives_a_busy_service(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    pulled = pull(
        out,
        answer(sent=GOOD[:1000], breaks=True),
        status(503, retry_after="7"),
        fails,
        resumed,
    )
    assert pulled.error is None and out.read_bytes() == GOOD
    assert pulled.requests[3].headers["range"] == "bytes=1000-"
    assert pulled.waits[1] >= 7 and len(pulled.waits) == 3


@pytest.mark.parametrize(
    "second",
    [
        answer(),
        answer(body_of(width=0.75), etag='"other"'),
    ],
    ids=["range ignored", "file changed"],
)
def test_a_range_answered_by_200_starts_again(tmp_path: Path, second: Handler) -> None:
    out = tmp_path / "net.safetensors"
    assert pull(out, answer(sent=GOOD[:1000], breaks=True), second).error is None
    assert network.load(out)(torch.rand(1, 1, 28, 28)).shape == (1, 10)
    assert digest(out.read_bytes()) in (digest(GOOD), digest(body_of(width=0.75)))


def test_no_etag_no_resume(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    pulled = pull(out, answer(sent=GOOD[:1000], breaks=True, etag=""), answer())
    assert pulled.error is None and "range" not in pulled.requests[1].headers
    assert out.read_bytes() == GOOD


def test_another_range_than_asked_for_is_no_part_of_the_file(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"

    def shifted(request: httpx.Request) -> httpx.Response:
        told = {
            "content-range": f"bytes 900-{len(GOOD) - 101}/{len(GOOD)}",
            "content-length": str(len(GOOD) - 1000),
            "etag": ETAG,
        }
        return httpx.Response(206, headers=told, stream=Parts([GOOD[900:-100]]))

    pulled = pull(out, answer(sent=GOOD[:1000], breaks=True), shifted, answer())
    assert pulled.error is None and out.read_bytes() == GOOD
    # Seen at once, not by the digest that a HEAD would have to be asked for.
    assert [request.method for request in pulled.requests] == ["GET"] * 3
    assert "range" not in pulled.requests[2].headers


def test_a_digest_that_came_too_late_is_asked_for(tmp_path: Path) -> None:
    """A cold answer states no digest; a flipped bit is found all the same."""
    out = tmp_path / "net.safetensors"
    flipped = GOOD[:-3] + bytes([GOOD[-3] ^ 1]) + GOOD[-2:]
    pulled = pull(out, answer(sent=flipped, repr_digest=""), answer(), answer())
    assert [request.method for request in pulled.requests] == ["GET", "HEAD", "GET"]
    assert pulled.error is None and out.read_bytes() == GOOD
    lost = pull(out, answer(repr_digest=""), fails, answer())
    assert [request.method for request in lost.requests] == ["GET", "HEAD", "HEAD"]
    assert lost.error is None


def entry(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["conv2.weight"]
    return found


def rewritten(change: Callable[[dict[str, Any]], object], tail: bytes = b"") -> bytes:
    """GOOD with its header changed, its digest and length honest."""
    count = int.from_bytes(GOOD[:8], "little")
    header = json.loads(GOOD[8 : 8 + count])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + GOOD[8 + count :] + tail


def about(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(header: dict[str, Any]) -> None:
        told = json.loads(header["__metadata__"]["neumeta"]) | changes
        header["__metadata__"]["neumeta"] = json.dumps(told)

    return change


BAD = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a page": b"<html><body>captive portal, please sign in</body></html>",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + GOOD[8:],
    "header cut": GOOD[:200],
    "truncated": GOOD[:-4],
    "too long": GOOD + b"1234",
    "header is a list": (8).to_bytes(8, "little") + b"[1,2,3] ",
    "deep header": (50_000).to_bytes(8, "little") + b"[" * 50_000,
    "no metadata": rewritten(lambda header: header.pop("__metadata__")),
    "no network": rewritten(lambda header: header.update(__metadata__={"format": "pt"})),
    "unknown family": rewritten(about(family="vgg")),
    "another family": rewritten(about(family="resnet-cifar", depth=[3, 3, 3])),
    "endless depth": rewritten(about(depth=[10**9])),
    "a tensor less": rewritten(lambda header: header.pop("conv2.bias")),
    "a tensor more": rewritten(lambda header: header.update(extra=entry(header))),
    "another shape": rewritten(lambda header: entry(header).update(shape=[16, 32, 3, 3])),
    "another dtype": rewritten(lambda header: entry(header).update(dtype="F64")),
    "asked for other dtype": body_of("float16"),
    "overlap": rewritten(lambda header: entry(header).update(data_offsets=[0, 18432])),
    "sizes beside the shapes": rewritten(about(sizes={"image": 1, "classes": 10})),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("kept", [False, True], ids=["first pull", "over a good file"])
def test_what_is_no_such_file_is_never_put_in_place(tmp_path: Path, name: str, kept: bool) -> None:
    out = tmp_path / "net.safetensors"
    if kept:
        out.write_bytes(b"the last good file")
    pulled = pull(out, answer(BAD[name]), retries=1)
    assert isinstance(pulled.error, client.PullError) and "arrived" in str(pulled.error)
    assert [path.name for path in tmp_path.iterdir()] == ([out.name] if kept else [])
    assert not kept or out.read_bytes() == b"the last good file"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_that_was_asked_for_is_accepted(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "net.safetensors"
    body = body_of(dtype)
    assert pull(out, answer(body), dtype=dtype).error is None and out.read_bytes() == body


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (status(503), "status 503"),
        (fails, "connection refused"),
        (answer(sent=GOOD[:10], breaks=True, etag=""), "peer closed"),
        (answer(sent=GOOD[:10], etag=""), "10 of"),
        (answer(sent=GOOD + b"more"), "of"),
        (answer(content_length=""), "length"),
        (answer(content_encoding="gzip"), "compressed"),
        (status(416), "shorter"),
    ],
)
def test_what_may_pass_is_tried_again_and_then_told(
    tmp_path: Path, handler: Handler, why: str
) -> None:
    pulled = pull(tmp_path / "net.safetensors", handler, retries=3)
    assert isinstance(pulled.error, client.PullError) and why in str(pulled.error)
    assert len(pulled.requests) == 4 and len(pulled.waits) == 3
    assert not pulled.error.refused and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_told_and_not_repeated(tmp_path: Path, code: int) -> None:
    pulled = pull(tmp_path / "net.safetensors", status(code))
    assert isinstance(pulled.error, client.PullError) and pulled.error.refused
    assert "why it is so" in str(pulled.error) and len(pulled.requests) == 1


def test_a_wait_beyond_reason_is_not_waited(tmp_path: Path) -> None:
    pulled = pull(tmp_path / "net.safetensors", status(429, retry_after="9" * 400))
    assert isinstance(pulled.error, client.PullError) and pulled.waits == []


def test_no_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    pulled = pull(tmp_path / "net.safetensors", answer())
    assert "no space" in str(pulled.error) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host", "http://127.0.0.1:1/%", "http://[::1", "http://host:port"]
)
def test_a_bad_url_is_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.pull, "__kwdefaults__", {**client.pull.__kwdefaults__, "retries": 0})
    code = client.main(["--arch", "lenet", "--url", url, "--out", str(tmp_path / "net")])
    error = capsys.readouterr().err
    assert code in (2, 3) and len(error.strip().splitlines()) == 1
    assert error.startswith("neumeta-pull: ") and list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "net.safetensors"
    assert client.main(["--arch", "lenet", "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "file" in error


def test_an_arch_stays_one_segment_of_the_path(tmp_path: Path) -> None:
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return httpx.Response(404)

    transport = httpx.MockTransport(handle)
    with (
        httpx.Client(base_url="http://service/prefix", transport=transport) as http,
        pytest.raises(client.PullError),
    ):
        client.pull("http://service", "../models?x=#", tmp_path / "net", client=http)
    assert seen == [b"/prefix/weights/..%2Fmodels%3Fx%3D%23"]


def test_a_current_file_is_not_pulled_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assert pull(out, answer()).error is None
    again = pull(out, lambda request: httpx.Response(304))
    assert again.error is None and again.requests[0].headers["if-none-match"] == ETAG
    out.write_bytes(GOOD[:-1])
    healed = pull(out, answer())
    assert "if-none-match" not in healed.requests[0].headers and out.read_bytes() == GOOD


def test_the_next_run_goes_on_where_an_earlier_one_gave_up(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assert pull(out, answer(sent=GOOD[:1000], breaks=True), retries=0).error
    later = pull(out, resumed)
    assert later.error is None and out.read_bytes() == GOOD
    assert later.requests[0].headers["range"] == "bytes=1000-"
    assert not list(tmp_path.glob(".*.incomplete"))


def test_what_was_left_of_another_request_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assert pull(out, answer(sent=GOOD[:1000], breaks=True), retries=0, width="0.75").error
    later = pull(out, answer())
    assert "range" not in later.requests[0].headers and out.read_bytes() == GOOD


def test_a_damaged_leftover_is_found_by_its_digest(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    assert pull(out, answer(sent=GOOD[:1000], breaks=True), retries=0).error
    (tmp_path / f".{out.name}.incomplete").write_bytes(bytes(1000))
    later = pull(out, resumed, answer())
    assert later.error is None and len(later.requests) == 2 and out.read_bytes() == GOOD


@pytest.mark.parametrize("damaged", [False, True])
def test_an_offline_start_needs_a_whole_file(
    tmp_path: Path, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, url = tmp_path / "net.safetensors", "http://service"
    assert pull(out, answer()).error is None
    if damaged:
        out.write_bytes(GOOD[:-1] + b"?")
    assert bool(client.kept_whole(url, "lenet", out)) is not damaged
    assert client.kept_whole(url, "lenet", out, {"width": "0.25"}) == ""

    def away(*args: object, **options: object) -> str:
        raise client.PullError("connection refused")

    monkeypatch.setattr(client, "pull", away)
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
    assert client.main([*asked, "--offline-ok"]) == int(damaged)
    assert client.main(asked) == 1
