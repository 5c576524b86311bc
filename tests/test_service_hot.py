"""What is answered before the framework is asked equals what the framework answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from neumeta import checkpoint
from service.hot import Target
from tests.conftest import lenet, served
from tests.test_service_edge import bearer

QUERY = "/weights/lenet?width=0.5"


def told(answer: httpx.Response) -> dict[str, str]:
    """The headers without what differs in every answer."""
    return {name: value for name, value in answer.headers.items() if name != "x-request-id"}


def test_a_repeated_answer_is_the_same_answer(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            cold = await client.get(QUERY)
            slow = await client.get(QUERY + "&seed=0")  # from memory, by way of the framework
            hot = await client.get(QUERY, headers={"x-request-id": "mine"})
            assert cold.content == slow.content == hot.content
            assert told(hot) == told(slow)
            assert hot.headers["x-neumeta-cache"] == "memory"
            assert hot.headers["x-request-id"] == "mine"
            ids = {(await client.get(QUERY)).headers["x-request-id"] for _ in range(3)}
            assert len(ids) == 3
            counted = (await client.get("/metrics")).text
            assert 'neumeta_requests_total{route="/weights",status="200"} 6.0' in counted
            assert 'neumeta_cache_answers_total{tier="memory"} 5.0' in counted
            assert (
                f'neumeta_sent_bytes_total{{route="/weights"}} {6.0 * len(cold.content)}' in counted
            )
            assert "neumeta_in_flight_requests 1.0" in counted  # the scrape itself

    asyncio.run(check())


def test_what_asks_for_something_else_goes_the_long_way(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            whole = await client.get(QUERY)
            await client.get(QUERY)
            part = await client.get(QUERY, headers={"range": "bytes=10-19"})
            assert (part.status_code, part.content) == (206, whole.content[10:20])
            etag = {"if-none-match": whole.headers["etag"]}
            assert (await client.get(QUERY, headers=etag)).status_code == 304
            head = await client.head(QUERY)
            assert (head.status_code, head.content) == (200, b"")
            assert (await client.post(QUERY)).status_code == 405
            assert (await client.get(QUERY + "&width=0.5")).status_code == 422

    asyncio.run(check())


def test_a_file_that_left_memory_is_made_again(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            first = await client.get(QUERY)
            await client.get(QUERY)
            app.state.cache.finished.clear()
            app.state.cache.bytes = 0
            again = await client.get(QUERY)
            assert again.headers["x-neumeta-cache"] == "computed"
            assert again.content == first.content

    asyncio.run(check())


def test_a_reload_forgets_and_a_late_plan_is_not_remembered(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            before = await client.get(QUERY)
            await client.get(QUERY)
            checkpoint.write(lenet(seed=7), file)
            await app.state.lifecycle.reload()
            after = await client.get(QUERY)
            assert after.headers["etag"] != before.headers["etag"]
            assert after.content != before.content
            # An answer that was planned before the reload and ends after it.
            scope = {"raw_path": b"/weights/lenet", "query_string": b"late", "method": "GET"}
            late = Target("key", b"", 0, lambda: iter(()), [])
            app.state.hot.keep(scope, late, app.state.hot.generation - 1)
            assert (await client.get("/weights/lenet?late")).status_code == 422

    asyncio.run(check())


def test_a_token_is_needed_for_a_repeated_answer_too(file: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alpha\n")

    async def check() -> None:
        async with served(file, tokens_file=str(tokens)) as (client, _):
            for _ in range(2):
                assert (await client.get(QUERY, headers=bearer("alpha"))).status_code == 200
            assert (await client.get(QUERY)).status_code == 401
            assert (await client.get(QUERY, headers=bearer("beta"))).status_code == 401

    asyncio.run(check())
