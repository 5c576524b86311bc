"""Content-addressed URLs: what they name may be kept for ever, and nothing else ever is there."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from neumeta import checkpoint
from service.app import BRIEFLY, FOREVER
from tests.conftest import lenet, served
from tests.test_service_edge import bearer
from tests.test_service_hot import told

CANONICAL = "/weights/lenet?width=0.5"


def digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def test_an_address_keeps_every_promise_and_is_never_stored_without_a_digest(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            head = await client.head(CANONICAL)
            address, etag = head.headers["content-location"], head.headers["etag"]
            assert address.endswith(f"&etag={etag[1:-1]}")
            # Nobody has sampled it: what is answered without its bytes is not to be kept.
            for cold in (
                await client.head(address),
                await client.get(address, headers={"range": "bytes=0-7"}),
            ):
                assert cold.headers["cache-control"] == "no-store"
                assert "repr-digest" not in cold.headers
            assert cold.content == (await client.get(CANONICAL)).content[:8]
            app.state.cache.finished.clear()
            app.state.cache.digests.clear()
            # The first whole answer is one that a cache may keep: it waits for its digest.
            first = await client.get(address)
            assert first.headers["x-neumeta-cache"] == "computed"
            hot = await client.get(address)
            assert hot.headers["x-neumeta-cache"] == "memory"
            part = await client.get(address, headers={"range": "bytes=-9"})
            same = await client.get(address, headers={"if-none-match": etag})
            whole = await client.head(address)
            for answer, status in (
                (first, 200),
                (hot, 200),
                (part, 206),
                (same, 304),
                (whole, 200),
            ):
                assert answer.status_code == status
                assert answer.headers.get_list("cache-control") == [f"public, {FOREVER}"]
                assert answer.headers.get_list("repr-digest") == [digest(first.content)]
                assert answer.headers["etag"] == etag
                assert answer.headers["content-location"] == address
                assert "x-accel-expires" not in answer.headers
            assert part.content == first.content[-9:]
            assert (
                whole.headers["content-length"] == str(len(first.content)) == str(len(hot.content))
            )
            late = await client.get(address, headers={"range": "bytes=99-", "if-range": '"x"'})
            assert late.status_code == 200 and late.content == first.content
            canonical = await client.get(CANONICAL)
            assert canonical.content == first.content
            assert canonical.headers["cache-control"] == "public, no-cache"

    asyncio.run(check())


def test_an_etag_of_the_past_or_of_nothing_is_told_where_the_file_is_and_not_kept(
    file: Path,
) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            plan = (await client.get("/plan/lenet?width=0.5")).json()
            old = plan["address"]
            assert (await client.get(old)).status_code == 200
            assert (await client.get(old)).headers["x-neumeta-cache"] == "memory"
            checkpoint.write(lenet(seed=7), file)
            await app.state.lifecycle.reload()
            now = (await client.post("/plan", json={"arch": "lenet", "width": 0.5})).json()
            assert now["address"] != old and now["location"] == plan["location"]
            for etag in (plan["etag"][1:-1], "0" * 64, "", "x" * 5000, '"' + now["etag"] + '"'):
                path = f"{now['location']}&etag={etag}"
                for headers in ({}, {"range": "bytes=0-7"}, {"if-none-match": "*"}):
                    gone = await client.get(path, headers=headers)
                    assert gone.status_code == 404 and gone.json()["address"] == now["address"]
                    assert gone.headers["content-type"] == "application/problem+json"
                    assert gone.headers["cache-control"] == "no-store"
                    assert gone.json()["errors"][0]["field"] == "etag"
                assert (await client.head(path)).status_code == 404
            assert (await client.get(now["address"])).content != b""
            twice = await client.get(now["address"] + "&etag=0")
            assert (twice.status_code, twice.json()["errors"][0]["field"]) == (422, "etag")
            body = {"arch": "lenet", "etag": plan["etag"]}
            assert (await client.post("/weights", json=body)).status_code == 422
            assert (await client.get("/plan/lenet?etag=0")).status_code == 422

    asyncio.run(check())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/weights/nobody?etag=0", 404),
        ("GET", "/weights/lenet?width=9&etag=0", 422),
        ("GET", "/nowhere", 404),
        ("PUT", "/weights/lenet", 405),
        ("GET", "/plan/nobody", 404),
    ],
)
def test_no_cache_keeps_an_error(file: Path, method: str, path: str, status: int) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            answer = await client.request(method, path)
            assert answer.status_code == status
            assert answer.headers["cache-control"] == "no-store"

    asyncio.run(check())


def test_a_file_that_cannot_be_made_is_an_error_and_not_a_kept_fragment(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            address = (await client.head(CANONICAL)).headers["content-location"]

            def breaks(job: Any) -> Iterator[bytes]:
                yield b"a few bytes"
                raise ValueError("a tensor is not finite")

            app.state.engine.weights = breaks
            answer = await client.get(address)
            assert answer.status_code == 500 and answer.headers["cache-control"] == "no-store"

    asyncio.run(check())


def test_who_leaves_while_the_digest_is_waited_for_stops_the_sampling(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            address = (await client.head(CANONICAL)).headers["content-location"]
            released, weights, sent = threading.Event(), app.state.engine.weights, []

            def slow(job: Any) -> Iterator[bytes]:
                assert released.wait(20)
                yield from weights(job)

            async def receive() -> dict[str, Any]:
                while not app.state.cache.flights:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            app.state.engine.weights = slow
            path, _, query = address.partition("?")
            scope = {
                "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1",
                "method": "GET", "scheme": "http", "path": path, "raw_path": path.encode(),
                "query_string": query.encode(), "root_path": "", "headers": [],
                "server": ("test", 80), "client": ("test", 1),
            }  # fmt: skip
            await app(scope, receive, send)
            assert not app.state.cache.flights and not sent
            released.set()
            assert (await client.get(address)).headers["x-neumeta-cache"] == "computed"

    asyncio.run(check())


def test_where_a_file_is_may_be_told_again_for_seconds(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            asked = "/plan/lenet?width=0.5"
            plan = await client.get(asked)
            posted = await client.post("/plan", json={"arch": "lenet", "width": 0.5})
            assert plan.json() == posted.json()
            assert plan.headers["cache-control"] == f"public, {BRIEFLY}"
            seconds = re.fullmatch(r"max-age=(\d+)", BRIEFLY)
            assert seconds and int(seconds[1]) <= 60
            assert "cache-control" not in posted.headers
            for tag in (plan.headers["etag"], plan.json()["etag"]):  # its own, or the file's
                same = await client.get(asked, headers={"if-none-match": tag})
                assert (same.status_code, same.content) == (304, b"")
                assert same.headers["cache-control"] == plan.headers["cache-control"]
            assert told(await client.head(asked)) == told(plan)
            sizes = await client.get("/models/lenet")
            assert sizes.headers["cache-control"] == plan.headers["cache-control"]

    asyncio.run(check())


def test_what_needs_a_token_is_kept_by_no_shared_cache(file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\n")

    async def check() -> None:
        async with served(file, tokens_file=str(tokens)) as (client, _):
            client.headers.update(bearer("alpha"))
            plan = await client.get("/plan/lenet?width=0.5")
            assert plan.headers["cache-control"] == f"private, {BRIEFLY}"
            for _ in range(2):
                answer = await client.get(plan.json()["address"])
                assert answer.headers["cache-control"] == f"private, {FOREVER}"
            del client.headers["authorization"]
            for path in (plan.json()["address"], "/plan/lenet?width=0.5"):
                closed = await client.get(path)
                assert closed.status_code == 401
                assert closed.headers["cache-control"] == "no-store"

    asyncio.run(check())
