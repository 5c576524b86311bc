"""The edge with the application inside: tokens, bounds, queries, readiness, log lines, reloads."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.life import manifold
from neumeta import checkpoint
from neumeta.manifold import Manifold
from service import engine, logs
from service.account import client_of
from service.app import create_app
from service.settings import Settings
from service.tokens import Tokens
from tests.conftest import lenet, served

QUERY = "/weights/lenet?width=0.5"


def endless(kind: str = "mlp") -> Manifold:
    """A manifold of finite parameters whose weights are not."""
    found = lenet(kind)
    with torch.no_grad():
        for parameter in found.representation.parameters():
            parameter.fill_(1e30)
    return found


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_without_a_token_only_the_probes_and_metrics_are_open(file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("# device fleet\nalpha\n\nbeta\n")

    async def check() -> None:
        async with served(file, tokens_file=str(tokens)) as (client, _):
            paths = ("/models", "/models/lenet", QUERY, "/docs", "/openapi.json", "/nowhere")
            wrong = (
                {},
                bearer("gamma"),
                bearer(""),
                bearer("alpha beta"),
                bearer("# device fleet"),
            )
            basic = {"Authorization": "Basic alpha"}
            for path in (*paths, "/livez/", "/livez/models", "/metrics/x"):
                told = set()
                for headers in (*wrong, basic):
                    answer = await client.get(path, headers=headers)
                    assert answer.status_code == 401, (path, headers)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    told.add(answer.content)
                assert len(told) == 1  # nothing says whether it was missing or wrong
            assert (await client.post("/weights", json={"arch": "lenet"})).status_code == 401
            for path in ("/", "/livez", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 200
            for token in ("alpha", "beta"):
                assert (await client.get(QUERY, headers=bearer(token))).status_code == 200
            text = (await client.get("/metrics")).text
            assert f'neumeta_rejected_total{{reason="token"}} {9 * 6 + 1}.0' in text
        async with served(file, tokens_file=str(tokens), metrics_open=False) as (client, _):
            assert (await client.get("/metrics")).status_code == 401
            assert (await client.get("/metrics", headers=bearer("beta"))).status_code == 200

    asyncio.run(check())


def test_tokens_rotate_by_rewriting_their_file(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("old\n")
    tokens = Tokens(path)
    assert tokens.allow(b"Bearer old") and tokens.allow(b"bearer old")
    path.write_text("old\nnew\n")
    assert tokens.allow(b"Bearer old") and tokens.allow(b"Bearer new")
    path.write_text("new\n")
    assert not tokens.allow(b"Bearer old") and tokens.allow(b"Bearer new")
    path.unlink()  # a secret that is being swapped shuts nobody out
    assert tokens.allow(b"Bearer new")
    path.write_text("")
    assert not tokens.allow(b"Bearer new") and not tokens.allow(b"Bearer ")
    with pytest.raises(ValueError, match="has no token"):
        Tokens(path)
    with pytest.raises(FileNotFoundError):
        create_app(Settings(models=str(file), tokens_file=str(tmp_path / "absent")))


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/docs", "/openapi.json"])
def test_a_query_without_a_meaning_is_refused(file: Path, path: str) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            refused = await client.get(f"{path}?verbose=1")
            assert refused.status_code == 422
            assert refused.json()["errors"][0]["field"] == "verbose"
            assert (await client.get(path)).status_code == 200

    asyncio.run(check())


def test_long_headers_are_431(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            many = {f"x-{n}": "a" * 100 for n in range(1000)}
            for headers in ({"x-big": "a" * 70_000}, many):
                answer = await client.get("/livez", headers=headers)
                assert answer.status_code == 431
                assert answer.headers["content-type"] == "application/problem+json"
            assert (await client.get("/livez", headers={"x-big": "a" * 30_000})).status_code == 200
            assert (
                'neumeta_rejected_total{reason="size"} 2.0' in (await client.get("/metrics")).text
            )

    asyncio.run(check())


def test_draining_is_not_ready_but_still_serves_and_sends_clients_away(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            assert "neumeta_ready 1.0" in (await client.get("/metrics")).text
            assert (await client.get("/readyz")).status_code == 200
            app.state.lifecycle.drain()
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/livez")).status_code == 200
            answer = await client.get(QUERY)
            assert answer.status_code == 200 and answer.headers["connection"] == "close"
            assert "neumeta_ready 0.0" in (await client.get("/metrics")).text

    asyncio.run(check())


@pytest.mark.parametrize(
    ("forwarded", "told"),
    [
        (None, "unix"),
        (b"", "unix"),
        (b"10.0.0.7", "10.0.0.7"),
        (b"6.6.6.6, 2001:db8::7", "2001:db8::7"),  # a client writes the first entries itself
        (b"a\nb", "unix"),
        (b"x" * 65, "unix"),
    ],
)
def test_a_unix_sockets_client_is_whom_the_proxy_saw(forwarded: bytes | None, told: str) -> None:
    headers = [] if forwarded is None else [(b"x-forwarded-for", forwarded)]
    assert client_of({"client": None, "headers": headers}) == told
    assert client_of({"client": ("10.1.1.1", 5), "headers": headers}) == "10.1.1.1"


def test_behind_a_prefix_tokens_guard_the_same_paths(file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\n")

    async def check() -> None:
        async with served(file, tokens_file=str(tokens), root_path="/a/b") as (client, _):
            for prefix in ("", "/a/b"):
                assert (await client.get(prefix + "/livez")).status_code == 200
                for path in ("/models", QUERY, "/docs", "/livez/", "/a/b/models", "/x/livez"):
                    assert (await client.get(prefix + path)).status_code == 401, prefix + path
                for _ in range(3):  # the last from what is repeated
                    answer = await client.get(prefix + QUERY, headers=bearer("alpha"))
                    assert answer.status_code == 200
                    assert answer.headers["content-location"].startswith("/a/b/weights/lenet?")
                assert (await client.get(prefix + QUERY)).status_code == 401
                missing = await client.get(prefix + "/nowhere", headers=bearer("alpha"))
                assert missing.status_code == 404
            assert (await client.get("/a/bc/livez")).status_code == 401

    asyncio.run(check())


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("neumeta")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_request_is_one_json_line(file: Path, lines: Lines) -> None:
    lines.setFormatter(logs.Json())

    async def check() -> None:
        async with served(file) as (client, app):
            answer = await client.get(QUERY, headers={"X-Request-Id": "night-7"})
            await client.get("/weights/a%0Ab%22")
            app.state.engine.describe = lambda job: 1 / 0
            await client.post("/plan", json={"arch": "lenet"}, headers={"X-Request-Id": "fault"})
            told = [json.loads(line) for line in lines.lines]
            ours, odd, trace, fault = told
            assert ours.pop("time").endswith("+00:00") and ours.pop("seconds") > 0
            assert ours == {
                "level": "info",
                "logger": "neumeta.request",
                "message": "request",
                "request_id": "night-7",
                "client": "127.0.0.1",
                "method": "GET",
                "route": "/weights",
                "path": "/weights/lenet",
                "status": 200,
                "bytes": len(answer.content),
                "tier": "computed",
            }
            assert odd["status"] == 404 and odd["path"] == '/weights/a\nb"'
            assert "ZeroDivisionError" in trace["exception"]
            assert trace["request_id"] == fault["request_id"] == "fault"
            assert (trace["level"], fault["status"]) == ("error", 500)

    asyncio.run(check())


def test_a_path_writes_no_text_lines_of_its_own(file: Path, lines: Lines) -> None:
    lines.setFormatter(logs.Text())

    async def check() -> None:
        async with served(file) as (client, _):
            await client.get("/weights/a%0A2026-01-01%20error%20forged")
        assert len(lines.lines) == 1 and "\n" not in lines.lines[0]
        assert "status=404" in lines.lines[0]

    asyncio.run(check())


def test_two_manifolds_are_served_side_by_side(tmp_path: Path) -> None:
    checkpoint.write(lenet(), tmp_path / "a.safetensors")
    checkpoint.write(manifold("resnet20"), tmp_path / "b.safetensors")

    async def check() -> None:
        async with served(tmp_path) as (client, _):
            names = [each["arch"] for each in (await client.get("/models")).json()["models"]]
            assert names == ["lenet", "resnet20"]
            for name in names:
                answer = await client.get(f"/weights/{name}?width=0.5")
                header = 8 + int.from_bytes(answer.content[:8], "little")
                about = json.loads(answer.content[8:header])["__metadata__"]["neumeta"]
                assert answer.status_code == 200 and json.loads(about)["arch"] == name
            text = (await client.get("/metrics")).text
            for name in names:
                assert f'neumeta_checkpoint_info{{arch="{name}"' in text

    asyncio.run(check())


def test_a_reload_swaps_and_what_is_under_way_ends_as_it_began(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            first = await client.get(QUERY)
            held, started, weights = threading.Event(), threading.Event(), app.state.engine.weights

            def slow(job: Any) -> Iterator[bytes]:
                started.set()
                assert held.wait(20)
                yield from weights(job)

            app.state.engine.weights = slow
            under_way = asyncio.create_task(client.get("/weights/lenet?width=0.75"))
            await asyncio.to_thread(started.wait, 20)
            digest = checkpoint.write(lenet(seed=1), file)
            await app.state.lifecycle.reload()
            held.set()
            old = await under_way
            app.state.engine.weights = weights
            second, new = await client.get(QUERY), await client.get("/weights/lenet?width=0.75")
            assert (
                first.content != second.content and first.headers["etag"] != second.headers["etag"]
            )
            assert old.content != new.content and len(old.content) == len(new.content)
            checkpoint.write(lenet(), file)
            await app.state.lifecycle.reload()
            again = await client.get("/weights/lenet?width=0.75&seed=0")
            assert again.content == old.content  # wholly the old file's
            text = (await client.get("/metrics")).text
            assert 'neumeta_reloads_total{outcome="ok"} 2.0' in text and digest not in text

    asyncio.run(check())


def test_a_manifold_is_tried_at_its_smallest_size(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, weights = [], engine.sample

    def noted(manifold: Any, architecture: Any, **options: Any) -> Any:
        tried.append(architecture.channels)
        return weights(manifold, architecture, **options)

    monkeypatch.setattr(engine, "sample", noted)
    engine.Engine([file], device="cpu")
    assert tried == [(8, 16, 16)]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone", "twice", "endless"])
def test_a_bad_file_keeps_what_is_served(file: Path, lines: Lines, damage: str) -> None:
    lines.setFormatter(logs.Json())

    async def check() -> None:
        async with served(file.parent) as (client, app):
            first, raw = await client.get(QUERY), file.read_bytes()
            if damage == "gone":
                file.unlink()
            elif damage == "twice":
                (file.parent / "copy.safetensors").write_bytes(raw)
            elif damage == "endless":
                checkpoint.write(endless(), file)
            else:
                file.write_bytes(raw[:-50] if damage == "truncated" else raw[:-9] + bytes(9))
            await app.state.lifecycle.reload()
            again = await client.get("/weights/lenet?width=0.75")
            assert again.status_code == 200
            assert (await client.get(QUERY)).content == first.content
            assert 'outcome="failed"} 1.0' in (await client.get("/metrics")).text
            errors = [json.loads(line) for line in lines.lines if '"error"' in line]
            assert len(errors) == 1 and "reload refused" in errors[0]["message"]
            assert str(file.parent) in errors[0]["message"]

    asyncio.run(check())


def test_a_checkpoint_is_no_map_of_its_file(file: Path) -> None:
    """What is loaded survives that the file is overwritten in place and cut to nothing."""
    read = checkpoint.read(file)
    before = {name: each.clone() for name, each in read.representation.state_dict().items()}
    with file.open("r+b") as handle:
        handle.write(os.urandom(file.stat().st_size))
    os.truncate(file, 0)
    tensors = {**read.representation.state_dict(), **read.frozen}
    assert all(tensors[name].equal(each) for name, each in before.items())
    assert all(float(each.sum()) == float(each.sum()) for each in read.frozen.values())
