"""The client against a service made for the test: whatever arrives, never a bad file at `out`."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from filelock import FileLock

from neumeta import network, wire
from neumeta import pull as client
from neumeta.command import main as neumeta_pull
from neumeta.failure import PullError
from neumeta.sample import sample
from neumeta.transfer import MOVES, json_values
from neumeta.whole import check_file
from tests.conftest import lenet

ETAG = '"tag"'


def body_of(dtype: str = "float32", width: float = 0.5) -> bytes:
    manifold = lenet()
    architecture = manifold.space.architecture(width)
    plan = wire.plan(manifold, architecture, dtype)
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


def files(folder: Path) -> list[str]:
    """What is there beside the lock's file, which stays."""
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")]


class Pulled(NamedTuple):
    requests: list[httpx.Request]
    waits: list[float]
    error: Exception | None


def pull(
    out: Path,
    *handlers: Handler,
    retries: int = 4,
    token: str = "",
    url: str = "http://service",
    plan: Handler | None = None,
    **parameters: str,
) -> Pulled:
    """Pull from a service whose n-th request is answered by the n-th handler (then the last), but for
    where the file is: that is answered by `plan`, and not told without one."""
    requests: list[httpx.Request] = []
    waits: list[float] = []

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and "/plan/" in request.url.path:
            return (plan or status(404))(request)
        requests.append(request)
        return handlers[min(len(requests), len(handlers)) - 1](request)

    transport = httpx.MockTransport(handle)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(base_url=url, transport=transport, headers=headers) as http:
        try:
            client.pull(
                url,
                "lenet",
                out,
                parameters=parameters,
                retries=retries,
                client=http,
                sleep=waits.append,
            )
        except (PullError, OSError) as error:
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


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "pull", partial(client.pull, retries=0))


def test_a_pulled_file_is_a_network(tmp_path: Path) -> None:
    out = tmp_path / "made" / "net.safetensors"
    assert pull(out, answer()).error is None
    assert out.read_bytes() == GOOD
    assert {path.name for path in out.parent.iterdir()} == {
        out.name,
        f".{out.name}.pull",
        f".{out.name}.lock",
    }
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


def graph_of(header: dict[str, Any]) -> str:
    return str(json.loads(header["__metadata__"]["neumeta"])["graph"])


def regraphed(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change of the graph that a file's metadata holds."""

    def changed(header: dict[str, Any]) -> None:
        held = json.loads(zlib.decompress(base64.b85decode(graph_of(header))))
        change(held)
        packed = base64.b85encode(zlib.compress(json.dumps(held).encode())).decode()
        about(graph=packed)(header)

    return changed


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
    "another arch": rewritten(about(arch="resnet20", names=["resnet32"])),
    "no graph": rewritten(about(graph=None)),
    "damaged graph": rewritten(lambda header: about(graph=graph_of(header)[:-9])(header)),
    "unknown operation": rewritten(regraphed(lambda held: held["nodes"][0].__setitem__(1, "exec"))),
    "another graph": rewritten(regraphed(lambda held: held["tensors"]["conv1.weight"].append(7))),
    "a huge axis": rewritten(about(channels=[1 << 40, 32, 32])),
    "no channels": rewritten(about(channels=[])),
    "other channels": rewritten(about(channels=[16, 32, 31])),
    "endless depth": rewritten(about(depth=[10**9])),
    "a tensor less": rewritten(lambda header: header.pop("conv2.bias")),
    "a tensor more": rewritten(lambda header: header.update(extra=entry(header))),
    "another shape": rewritten(lambda header: entry(header).update(shape=[16, 32, 3, 3])),
    "another dtype": rewritten(lambda header: entry(header).update(dtype="F64")),
    "asked for other dtype": body_of("float16"),
    "int8": body_of("int8"),
    "overlap": rewritten(lambda header: entry(header).update(data_offsets=[0, 18432])),
}


@pytest.mark.parametrize("name", list(BAD))
@pytest.mark.parametrize("kept", [False, True], ids=["first pull", "over a good file"])
def test_what_is_no_such_file_is_never_put_in_place(tmp_path: Path, name: str, kept: bool) -> None:
    out = tmp_path / "net.safetensors"
    if kept:
        out.write_bytes(b"the last good file")
    pulled = pull(out, answer(BAD[name]), retries=1)
    assert isinstance(pulled.error, PullError) and "arrived" in str(pulled.error)
    assert files(tmp_path) == ([out.name] if kept else [])
    assert not kept or out.read_bytes() == b"the last good file"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_dtype_that_was_asked_for_is_accepted(tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "net.safetensors"
    body = body_of(dtype)
    assert pull(out, answer(body), dtype=dtype).error is None and out.read_bytes() == body
    check_file(out)
    if dtype == "int8":
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        start, end = header.pop("conv1.weight_scale")["data_offsets"]
        raw = json.dumps(header).encode()
        at = 8 + int.from_bytes(body[:8], "little")
        data = body[at : at + start] + body[at + end :]
        out.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
        with pytest.raises(PullError, match="conv1.weight_scale is missing"):
            check_file(out)


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
    assert isinstance(pulled.error, PullError) and why in str(pulled.error)
    assert len(pulled.requests) == 4 and len(pulled.waits) == 3
    assert not pulled.error.refused and files(tmp_path) == []


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_a_refusal_is_told_and_not_repeated(tmp_path: Path, code: int) -> None:
    pulled = pull(tmp_path / "net.safetensors", status(code))
    assert isinstance(pulled.error, PullError) and pulled.error.refused
    assert "why it is so" in str(pulled.error) and len(pulled.requests) == 1


def test_a_wait_beyond_reason_is_not_waited(tmp_path: Path) -> None:
    pulled = pull(tmp_path / "net.safetensors", status(429, retry_after="9" * 400))
    assert isinstance(pulled.error, PullError) and pulled.waits == []


def test_no_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    pulled = pull(tmp_path / "net.safetensors", answer())
    assert "no space" in str(pulled.error) and files(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://host", "http://127.0.0.1:1/%", "http://[::1", "http://host:port"]
)
def test_a_bad_url_is_one_line(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], once: None
) -> None:
    code = neumeta_pull(["--arch", "lenet", "--url", url, "--out", str(tmp_path / "net")])
    error = capsys.readouterr().err
    assert code in (2, 3) and len(error.strip().splitlines()) == 1
    assert error.startswith("neumeta-pull: ") and files(tmp_path) == []


def test_a_named_depth_is_a_file_of_its_manifold(tmp_path: Path) -> None:
    """resnet32 is resnet20 at another depth: the file says both names, and no third one."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(rewritten(about(arch="resnet20", names=["resnet32"])))
    for name in ("resnet20", "resnet32", ""):
        check_file(path, name)
    with pytest.raises(PullError, match="it is 'resnet20'"):
        check_file(path, "resnet44")


def test_widths_by_group_are_an_object_where_a_body_is_sent() -> None:
    asked = {"width": "a:0.5,b.c:1", "depth": "3", "seed": "1"}
    told = {"width": {"a": 0.5, "b.c": 1.0}, "depth": [3], "seed": 1}
    assert json_values(asked) == told
    assert json_values({"width": "0.5,1"}) == {"width": [0.5, 1]}
    assert json_values({"format": "onnx"}) == {"format": "onnx"}


def test_the_client_imports_no_torch() -> None:
    code = "import sys, neumeta.command; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_where_nothing_can_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    out = tmp_path / "file" / "net.safetensors"
    assert neumeta_pull(["--arch", "lenet", "--out", str(out)]) == 3
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
        pytest.raises(PullError),
    ):
        client.pull("http://service", "../models?x=#", tmp_path / "net", client=http)
    asked = b"..%2Fmodels%3Fx%3D%23"
    assert seen == [b"/prefix/plan/" + asked, b"/prefix/weights/" + asked]


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
        raise PullError("connection refused")

    monkeypatch.setattr(client, "pull", away)
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
    assert neumeta_pull([*asked, "--offline-ok"]) == int(damaged)
    assert neumeta_pull(asked) == 1


# Behind caches


def test_a_digest_is_asked_for_past_every_cache(tmp_path: Path) -> None:
    """A cache keeps the answer that had no digest; HEAD passes it, or POST /plan does."""
    silent = answer(repr_digest="")

    def planned(request: httpx.Request) -> httpx.Response:
        told = json.loads(request.content)
        assert told == {"arch": "lenet", "width": 0.5, "depth": [3], "seed": 7, "extrapolate": True}
        return httpx.Response(200, json={"etag": ETAG, "repr_digest": digest(GOOD)})

    def stored(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return planned(request)
        if request.method == "GET" and "range" in request.headers:
            return httpx.Response(206, headers={"etag": ETAG}, content=GOOD[-1:])
        return silent(request)

    out = tmp_path / "net.safetensors"
    asked = {"width": "0.5", "depth": "3", "seed": "7", "extrapolate": "true"}
    pulled = pull(out, stored, **asked)
    assert pulled.error is None and out.read_bytes() == GOOD
    assert [each.method for each in pulled.requests] == ["GET", "HEAD", "GET", "HEAD", "POST"]
    assert all(each.headers["cache-control"] == "no-cache" for each in pulled.requests[1:4])
    assert "cache-control" not in pulled.requests[0].headers  # the file itself may be stored
    assert pulled.requests[-1].url.path == "/plan"


@pytest.mark.parametrize(
    "told",
    [
        {"etag": '"other"', "repr_digest": digest(GOOD)},
        {"etag": ETAG, "repr_digest": None},
        {"etag": ETAG},
        ["no", "plan"],
    ],
)
def test_a_plan_of_another_file_vouches_for_nothing(tmp_path: Path, told: Any) -> None:
    silent = answer(repr_digest="")

    def stored(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=told) if request.method == "POST" else silent(request)

    pulled = pull(tmp_path / "net.safetensors", stored, retries=1)
    assert "no digest vouches" in str(pulled.error)
    assert not (tmp_path / "net.safetensors").exists()


def moved(to: str, code: int = 302) -> Handler:
    return lambda request: httpx.Response(code, headers={"location": to})


# The address that names the content

E, OTHER_E = "e" * 64, "f" * 64
ADDRESS = f"/fleet/weights/lenet?width=0.5&dtype=float32&etag={E}"


def planned(etag: str = E, **changes: Any) -> Handler:
    """A plan that says where the file of this ETag is, and which digest it has."""
    told = {"etag": f'"{etag}"', "address": ADDRESS.replace(E, etag), "repr_digest": digest(GOOD)}
    return lambda request: httpx.Response(200, json=told | changes)


def here(body: bytes = GOOD, etag: str = E, **changes: str) -> Handler:
    return answer(body, etag=f'"{etag}"', **changes)


def test_the_file_is_asked_for_at_the_address_that_names_its_content(tmp_path: Path) -> None:
    out = tmp_path / "net"
    pulled = pull(out, here(), plan=planned(), url="http://service/fleet", width="0.50")
    (asked,) = pulled.requests
    assert pulled.error is None and asked.url.raw_path.decode() == ADDRESS
    # Another prefix than the service knows of: who asks knows best.
    again = pull(tmp_path / "x", here(), plan=planned(repr_digest=None), url="http://mirror/a")
    assert again.error is None
    assert str(again.requests[0].url) == "http://mirror/a" + ADDRESS.removeprefix("/fleet")


def test_a_current_file_costs_one_short_question(tmp_path: Path) -> None:
    out, asked = tmp_path / "net", []

    def same(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("if-none-match"))
        return httpx.Response(304)

    assert pull(out, here(), plan=planned()).error is None
    again = pull(out, fails, plan=same)
    assert again.error is None and again.requests == [] and asked == [f'W/"{E}"']


def gone(etag: str) -> Handler:
    told = {"detail": "another is here", "address": ADDRESS.replace(E, etag)}
    return lambda request: httpx.Response(404, json=told)


def test_a_reload_in_between_is_followed_and_one_after_another_ends_at_the_canonical_url(
    tmp_path: Path,
) -> None:
    moved_once = pull(tmp_path / "a", gone(OTHER_E), here(etag=OTHER_E), plan=planned(), retries=0)
    assert moved_once.error is None and OTHER_E in str(moved_once.requests[1].url)
    endless = pull(tmp_path / "b", *[gone(OTHER_E)] * MOVES, here(), plan=planned())
    assert endless.error is None and "etag" not in str(endless.requests[-1].url)
    assert len(endless.requests) == MOVES + 1 and endless.waits == []
    # A cache's own 404 names no address.
    page = status(404, content_type="text/html")
    lost = pull(tmp_path / "c", page, here(), plan=planned())
    assert lost.error is None and "etag" not in str(lost.requests[1].url)


STALE = body_of(width=0.25)
STALE_BY_BODY = here(STALE, E)
"""Its digest is that of what it sends: only the plan's is not."""


@pytest.mark.parametrize(
    "stale",
    [
        here(STALE, OTHER_E),
        STALE_BY_BODY,
        answer(STALE, etag=""),
        here(sent=STALE + GOOD[len(STALE) :]),
        lambda request: httpx.Response(304, headers={"etag": f'"{OTHER_E}"'}),
        moved("/weights/lenet?width=0.5"),
    ],
    ids=["another etag", "another body", "no etag", "damaged", "unasked 304", "redirect"],
)
@pytest.mark.parametrize("told", [True, False], ids=["digest told", "not told"])
def test_a_stale_copy_in_a_cache_is_found_out_and_passed_by(
    tmp_path: Path, stale: Handler, told: bool
) -> None:
    if not told and stale is STALE_BY_BODY:
        return  # nothing tells them apart
    out = tmp_path / "net"

    def cache(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            assert json.loads(request.content) == {"arch": "lenet", "width": 0.5}
            return here()(request)
        return (stale if "etag" in request.url.params else here(STALE, OTHER_E))(request)

    plan = planned() if told else planned(repr_digest=None)
    pulled = pull(out, cache, plan=plan, width="0.5")
    assert pulled.error is None and out.read_bytes() == GOOD
    assert pulled.requests[-1].method == "POST"


@pytest.mark.parametrize(
    "plan",
    [
        lambda request: httpx.Response(200, text="<html>sign in</html>"),
        lambda request: httpx.Response(200, json=["no", "plan"]),
        lambda request: httpx.Response(200, json={"etag": f'"{E}"'}),
        planned(address=f"http://elsewhere/?etag={E}"),
        planned(address=f"/weights/lenet?etag={E}\r\nx: y"),
        planned(address="/weights/lenet?etag="),
        planned(address=7),
        status(404),
        status(403),
        status(405),
    ],
)
def test_without_a_plan_the_canonical_url_is_asked(tmp_path: Path, plan: Handler) -> None:
    pulled = pull(tmp_path / "net", answer(), plan=plan)
    assert pulled.error is None and len(pulled.requests) == 1
    assert pulled.requests[0].url.path == "/weights/lenet"
    assert "etag" not in str(pulled.requests[0].url)


def test_what_a_plan_refuses_is_told_at_once_and_what_may_pass_is_tried_again(
    tmp_path: Path,
) -> None:
    for code in (401, 422):
        refused = pull(tmp_path / "net", answer(), plan=status(code))
        assert isinstance(refused.error, PullError) and refused.error.refused
        assert "why it is so" in str(refused.error) and refused.requests == []
    busy = iter([status(503, retry_after="3"), fails, planned()])
    later = pull(tmp_path / "net", here(), plan=lambda request: next(busy)(request))
    assert later.error is None and later.waits[0] >= 3 and len(later.waits) == 2


# Redirects


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_and_another_host_gets_no_token(tmp_path: Path, code: int) -> None:
    out = tmp_path / "net.safetensors"
    pulled = pull(
        out,
        moved("/elsewhere", code),
        moved("http://mirror/net", code),
        answer(),
        token="secret",
    )
    assert pulled.error is None and out.read_bytes() == GOOD
    assert [each.url.host for each in pulled.requests] == ["service", "service", "mirror"]
    assert [each.headers.get("authorization") for each in pulled.requests] == [
        "Bearer secret",
        "Bearer secret",
        None,
    ]


@pytest.mark.parametrize("to", ["http://service/", "http://service:81/", "https://other/"])
def test_a_token_stays_with_its_scheme_host_and_port(tmp_path: Path, to: str) -> None:
    pulled = pull(tmp_path / "net", moved(to), answer(), token="secret")
    kept = to == "http://service/"
    assert ("authorization" in pulled.requests[1].headers) is kept


def test_redirects_end(tmp_path: Path) -> None:
    pulled = pull(tmp_path / "net", moved("/again"))
    assert "redirected more than 5 times" in str(pulled.error) and len(pulled.requests) == 6
    assert pulled.waits == [] and files(tmp_path) == []


def test_a_redirect_from_https_to_http_is_not_followed(tmp_path: Path) -> None:
    pulled = pull(tmp_path / "net", moved("http://service/net"), url="https://service")
    assert "https to http" in str(pulled.error) and len(pulled.requests) == 1


# What is at `out`


def command(out: Path, *more: str, url: str = "http://127.0.0.1:9") -> list[str]:
    return ["--arch", "lenet", "--url", url, "--out", str(out), *more]


@pytest.mark.parametrize("content", [b"", b"notes about lunch", GOOD[:-1], GOOD + b"x"])
def test_what_is_no_whole_network_is_not_called_the_last_good_file(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str], once: None
) -> None:
    out = tmp_path / "net.safetensors"
    out.write_bytes(content)
    assert neumeta_pull(command(out)) == 3
    error = capsys.readouterr().err
    assert "good" not in error and "no whole network" in error
    assert len(error.strip().splitlines()) == 1 and out.read_bytes() == content
    out.write_bytes(body_of("float16"))
    assert neumeta_pull(command(out)) == 1
    assert "last good file" in capsys.readouterr().err


def test_only_a_regular_file_is_ever_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], once: None
) -> None:
    fifo, folder, loop = tmp_path / "fifo", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for out in (fifo, folder, loop, link, Path("/dev/null")):
        before = out.lstat()
        assert neumeta_pull(command(out)) == 2
        assert out.lstat().st_ino == before.st_ino and out.lstat().st_mode == before.st_mode
        error = capsys.readouterr().err
        assert str(out) in error and len(error.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "folder", "loop", "link"}


def test_a_symbolic_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    target, link = store / "net-1", tmp_path / "net"
    link.symlink_to(target)
    for content in (None, b"old"):
        if content is not None:
            target.write_bytes(content)
        assert pull(link, answer()).error is None
        assert link.is_symlink() and target.read_bytes() == GOOD
    assert client.kept_whole("http://service", "lenet", link)
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == ["net"]


# The lock, the environment, Ctrl-C


def test_a_held_lock_is_waited_for_with_a_word_and_a_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.safetensors"
    with FileLock(tmp_path / f".{out.name}.lock"):
        assert neumeta_pull(command(out, "--lock-wait", "0.2")) == 3
    first, last = capsys.readouterr().err.strip().splitlines()
    assert "waiting for another pull" in first and "at most 0.2 seconds" in first
    assert "another pull has held it for 0.2 seconds" in last
    assert files(tmp_path) == []


def test_a_lock_that_comes_free_is_taken(tmp_path: Path) -> None:
    out, lock = tmp_path / "net.safetensors", FileLock(tmp_path / ".net.safetensors.lock")
    lock.acquire()
    transport = httpx.MockTransport(answer())
    with httpx.Client(base_url="http://service", transport=transport) as http:
        client.pull("http://service", "lenet", out, client=http, waiting=lock.release)
    assert out.read_bytes() == GOOD


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    "value",
    [
        "foo://user:secret@bar",
        "socks5://user:secret@bar:1",
        "http://user:secret@bar:port",
        "http://user:secret@[::1",
        "http://user:secret@bar:99999",
        "http://",
        "://user:secret@bar",
    ],
)
def test_a_bad_proxy_is_one_line_that_names_the_variable(
    tmp_path: Path,
    name: str,
    value: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    assert neumeta_pull(command(tmp_path / "net")) == 2
    error = capsys.readouterr().err
    assert name in error and len(error.strip().splitlines()) == 1 and "secret" not in error


def test_other_bad_variables_are_named_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, once: None
) -> None:
    for name, value in (("no_proxy", "localhost,[::1"), ("SSL_CERT_FILE", "/nowhere/at/all")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert neumeta_pull(command(tmp_path / "net")) == 2
            error = capsys.readouterr().err
            assert name in error and len(error.strip().splitlines()) == 1
    for good in ("localhost,127.0.0.1,::1,.example.org,10.0.0.0/8", "*", ""):
        monkeypatch.setenv("NO_PROXY", good)
        assert neumeta_pull(command(tmp_path / "net")) == 3
    assert "NO_PROXY" not in capsys.readouterr().err


def test_ctrl_c_while_it_waits_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "pull", interrupted)
    assert neumeta_pull(command(tmp_path / "net")) == 130
    error = capsys.readouterr().err
    assert "interrupted" in error and len(error.strip().splitlines()) == 1
