"""The tier replicas share, on a real Redis: hits, damage, leases, faults, and two real replicas."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from benchmarks.local import SAMPLED, Answer, RedisServer, Service, fetch, replicas
from neumeta import checkpoint
from service.app import create_app
from service.cache import Away, Body, Busy, Cache
from service.metrics import Metrics
from service.redis_cache import PART, PREFIX, RedisCache
from service.settings import Settings
from tests.conftest import lenet

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed"
)
HEAD = b"the header"
KEY = hashlib.sha256(b"key").hexdigest()


def run(coroutine: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path)
    yield found
    found.signal(signal.SIGCONT) if found.process else None
    found.kill()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    return path


@asynccontextmanager
async def tier(url: str, *, lease: float = 5.0, **changes: Any) -> AsyncIterator[RedisCache]:
    options = {"timeout": 0.2, "pause": 0.1, **changes}
    found = RedisCache(url, lease=lease, metrics=Metrics(), **options)
    yield found
    await found.close()


@asynccontextmanager
async def cached(shared: RedisCache, **changes: Any) -> AsyncIterator[Cache]:
    cache = Cache(1 << 20, shared=shared, metrics=shared.metrics, **changes)
    yield cache
    await cache.close()


async def read(body: Body) -> bytes:
    return b"".join([bytes(chunk) async for chunk in body.read(0, body.length)])


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"neumeta_{name}", labels)
    assert found is not None, name
    return found


def never() -> Iterator[bytes]:
    raise AssertionError("nothing should be made")
    yield b""


@pytest.mark.parametrize("length", [100, PART - PREFIX, PART - PREFIX + 1, 3 * PART + 7])
def test_what_one_replica_makes_another_has(server: RedisServer, length: int) -> None:
    whole = HEAD + bytes(range(256)) * (length // 256 + 1)
    whole = whole[:length]

    async def check() -> None:
        async with tier(server.url) as shared, cached(shared) as cache:
            body, origin = await cache.get(KEY, HEAD, length, lambda: iter([whole[len(HEAD) :]]))
            assert origin == "computed" and await read(body) == whole
        async with tier(server.url) as shared, cached(shared) as cache:
            body, origin = await cache.get(KEY, HEAD, length, never)
            assert origin == "redis" and await read(body) == whole
            assert body.sha256 == hashlib.sha256(whole).digest() and cache.digests[KEY]
            assert value(shared.metrics, "lease_total", outcome="won") == 0
            assert (KEY in cache.finished) == (length <= cache.max_bytes)
        async with Redis.from_url(server.url) as raw:
            assert await raw.keys() == [f"neumeta:{KEY}".encode()]  # no lease is left behind

    run(check())


def other_key(raw: bytes) -> bytes:
    return hashlib.sha256(b"other").digest() + raw[32:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw + b"!",
        lambda raw: raw[:PREFIX],
        lambda raw: raw[:10],
        lambda raw: b"short",
        lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:],
        lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:],
        lambda raw: raw[:39] + bytes([raw[39] + 1]) + raw[40:],
        other_key,
    ],
)
@pytest.mark.parametrize("length", [200, PART + 200])
def test_a_damaged_value_is_dropped_and_made_again(
    server: RedisServer, damage: Any, length: int
) -> None:
    whole = HEAD + b"x" * (length - len(HEAD))

    async def check() -> None:
        async with tier(server.url) as shared:
            await shared.put(KEY, bytearray(whole), hashlib.sha256(whole).digest())
            async with Redis.from_url(server.url) as raw:
                name = f"neumeta:{KEY}"
                good = await raw.get(name)
                await raw.set(name, damage(good))
                async with cached(shared) as cache:
                    made = iter([whole[len(HEAD) :]])
                    body, origin = await cache.get(KEY, HEAD, length, lambda: made)
                    assert origin == "computed" and await read(body) == whole
                assert await raw.get(name) == good

    run(check())


def test_a_hit_of_another_header_is_no_hit(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url) as shared:
            whole = b"other head" + b"x" * 50
            await shared.put(KEY, bytearray(whole), hashlib.sha256(whole).digest())
            assert await shared.get(KEY, HEAD, len(whole)) is None
            assert await shared.get(KEY, b"other head", len(whole)) is None  # it was dropped

    run(check())


def test_two_caches_make_one_body(server: RedisServer) -> None:
    async def check() -> None:
        released, calls = threading.Event(), 0

        def produce() -> Iterator[bytes]:
            nonlocal calls
            calls += 1
            assert released.wait(20)
            yield b"rest"

        async with (
            tier(server.url, lease=0.3) as one,
            tier(server.url, lease=0.3) as two,
            cached(one) as first,
            cached(two) as second,
        ):
            length = len(HEAD) + 4
            a, origin = await first.get(KEY, HEAD, length, produce)
            assert origin == "computed"
            b, origin = await second.get(KEY, HEAD, length, produce)
            assert origin == "coalesced"
            # The head is there at once; the lease outlives its time while its holder lives.
            assert await anext(b.read(0, len(HEAD))) == HEAD
            await asyncio.sleep(0.8)
            released.set()
            assert await read(a) == await read(b) == HEAD + b"rest"
            assert calls == 1 and a.sha256 == b.sha256
            assert value(one.metrics, "lease_total", outcome="won") == 1
            assert value(two.metrics, "lease_total", outcome="waited") == 1
            assert value(two.metrics, "cache_misses_total", tier="redis") == 1

    run(check())


def test_a_lease_whose_holder_died_expires(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url, lease=0.4) as shared, cached(shared) as cache:
            assert await shared.lease(KEY, "the dead one's")
            began = time.monotonic()
            body, origin = await cache.get(KEY, HEAD, 20, lambda: iter([b"0123456789"]))
            assert origin == "coalesced" and await read(body) == HEAD + b"0123456789"
            assert 0.2 < time.monotonic() - began < 2
            assert value(shared.metrics, "lease_total", outcome="expired") == 1

    run(check())


def test_a_holder_that_lives_but_never_ends_is_not_waited_for(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url, lease=0.1) as shared, cached(shared) as cache:
            renewing = asyncio.create_task(cache._renew(shared, KEY, "slow"))
            assert await shared.lease(KEY, "slow")
            body, _ = await cache.get(KEY, HEAD, 20, lambda: iter([b"0123456789"]))
            assert await read(body) == HEAD + b"0123456789"
            renewing.cancel()
            assert value(shared.metrics, "lease_total", outcome="expired") == 1

    run(check())


def test_only_the_holder_releases_or_renews(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url, lease=30) as shared, Redis.from_url(server.url) as raw:
            name = f"neumeta:lease:{KEY}"
            assert await shared.lease(KEY, "mine") and not await shared.lease(KEY, "yours")
            await shared.release(KEY, "yours")
            assert await raw.get(name) == b"mine"
            await raw.pexpire(name, 5000)
            await shared.renew(KEY, "yours")
            assert await raw.pttl(name) <= 5000
            await shared.renew(KEY, "mine")
            assert await raw.pttl(name) > 20_000
            await shared.release(KEY, "mine")
            assert await raw.get(name) is None

    run(check())


def test_the_lease_is_free_again_when_everyone_left_or_making_failed(server: RedisServer) -> None:
    async def check() -> None:
        released = threading.Event()

        def blocked() -> Iterator[bytes]:
            assert released.wait(20)
            yield b"01234"
            raise AssertionError("it should have stopped by now")

        def broken() -> Iterator[bytes]:
            raise OSError("broken")
            yield b""

        async with tier(server.url) as shared, cached(shared) as cache:
            body, _ = await cache.get(KEY, HEAD, 20, blocked)
            while not body.stop or value(shared.metrics, "queue") or len(body.data) < 20:
                await asyncio.sleep(0.01)
            body.leave()
            released.set()
            while not await shared.lease(KEY, "next"):
                await asyncio.sleep(0.01)
            await shared.release(KEY, "next")
            body, _ = await cache.get(KEY, HEAD, 20, broken)
            with pytest.raises(RuntimeError):
                await read(body)
            while not await shared.lease(KEY, "next"):
                await asyncio.sleep(0.01)
            assert value(shared.metrics, "sampling_cancelled_total") == 1
            assert value(shared.metrics, "sampling_failures_total") == 1

    run(check())


def test_busy_is_said_of_what_must_be_made_and_not_of_hits(server: RedisServer) -> None:
    async def check() -> None:
        released = threading.Event()

        def blocked() -> Iterator[bytes]:
            assert released.wait(20)
            yield b"0123456789"

        keys = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]
        whole = HEAD + b"0123456789"
        async with tier(server.url) as shared, cached(shared, max_flights=1) as cache:
            await shared.put(keys[2], bytearray(whole), hashlib.sha256(whole).digest())
            first, _ = await cache.get(keys[0], HEAD, 20, blocked)
            with pytest.raises(Busy):
                await cache.get(keys[1], HEAD, 20, blocked)
            assert (await cache.get(keys[2], HEAD, 20, never))[1] == "redis"
            released.set()
            assert await read(first) == whole
            while cache.making:
                await asyncio.sleep(0.01)
            assert (await cache.get(keys[1], HEAD, 20, blocked))[1] == "computed"

    run(check())


def test_the_body_is_stored_though_its_reader_left(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url) as shared, cached(shared) as cache:
            body, _ = await cache.get(KEY, HEAD, 20, lambda: iter([b"0123456789"]))
            reading = asyncio.create_task(read(body))
            await reading
            body.leave()
            await cache.close()
            assert await shared.get(KEY, HEAD, 20) is not None

    run(check())


def test_a_redis_that_hangs_is_left_alone_and_found_again(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url) as shared, Redis.from_url(server.url) as raw:
            await raw.set("x", 1)
            assert await shared.ping()
            server.signal(signal.SIGSTOP)
            took = []
            for _ in range(3):
                began = time.monotonic()
                with pytest.raises(Away):
                    await shared.get(KEY, HEAD, 20)
                took.append(time.monotonic() - began)
            assert max(took) < 0.25 and min(took) > 0.15
            assert shared.open and value(shared.metrics, "circuit_open") == 1
            began = time.monotonic()
            with pytest.raises(Away):
                await shared.get(KEY, HEAD, 20)
            assert time.monotonic() - began < 0.01
            await asyncio.sleep(0.5)
            assert shared.open
            server.signal(signal.SIGCONT)
            while shared.open:
                await asyncio.sleep(0.01)
            assert value(shared.metrics, "circuit_open") == 0
            assert await shared.get(KEY, HEAD, 20) is None
            assert value(shared.metrics, "redis_errors_total", operation="get") >= 3

    run(check())


def test_a_busy_event_loop_is_not_a_slow_redis(server: RedisServer) -> None:
    async def check() -> None:
        async with tier(server.url, timeout=0.1) as shared:
            assert await shared.ping()
            asking = asyncio.create_task(shared.get(KEY, HEAD, 20))
            for _ in range(4):
                await asyncio.sleep(0)
                time.sleep(0.15)  # noqa: ASYNC251 the loop is blocked on purpose
            assert await asking is None

    run(check())


@pytest.mark.parametrize(
    ("options", "address"),
    [
        (("--requirepass", "secret"), "redis://:secret@127.0.0.1:{port}/0"),
        ((), "valkey://127.0.0.1:{port}"),
        (("--cluster-enabled", "yes"), "redis+cluster://127.0.0.1:{port}"),
        (("--tls-port",), "rediss://localhost:{port}?ssl_ca_certs={folder}/cert.pem"),
    ],
)
def test_password_valkey_cluster_and_tls(
    tmp_path: Path, options: tuple[str, ...], address: str
) -> None:
    if options == ("--tls-port",):
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        cert, secret = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
            + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
            + ["-keyout", secret, "-out", cert],
            check=True,
            capture_output=True,
        )
        options = ("--port", "0", "--tls-port", "{port}", "--tls-auth-clients", "no")
        options += ("--tls-cert-file", cert, "--tls-key-file", secret)
    server = RedisServer(tmp_path, *options)
    url = address.format(port=server.port, folder=tmp_path)
    whole = HEAD + b"0123456789"

    async def check() -> None:
        if "+cluster" in url:
            async with Redis.from_url(server.url) as raw:
                await raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
                while b"cluster_state:ok" not in await raw.execute_command("CLUSTER", "INFO"):
                    await asyncio.sleep(0.05)
        async with tier(url, timeout=1.0) as shared:
            for origin in ("computed", "redis"):
                async with cached(shared) as cache:
                    body, found = await cache.get(KEY, HEAD, 20, lambda: iter([whole[10:]]))
                    assert found == origin and await read(body) == whole
            assert value(shared.metrics, "lease_total", outcome="won") == 1
            assert not shared.open

    try:
        run(check())
    finally:
        server.kill()


@pytest.mark.parametrize(
    "url",
    ["http://:secret@x", "secret", "unix+cluster:///x", "redis://:secret@x:port", "redis+x://"],
)
def test_a_bad_url_is_one_line_that_shows_no_password(
    models: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from service.cli import serve

    assert serve(["--models", str(models), "--redis-url", url]) == 2
    told = capsys.readouterr().err
    assert "redis_url: " in told and "secret" not in told and len(told.splitlines()) == 1


def test_the_service_says_redis_and_degraded_and_serves_on(
    server: RedisServer, models: Path
) -> None:
    async def check() -> None:
        settings = Settings(
            models=str(models), redis_url=server.url, redis_pause=0.1, cache_bytes=0
        )
        app = create_app(settings)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            url = "/weights/lenet?width=0.5"
            first = await client.get(url)
            while app.state.cache.flights:
                await asyncio.sleep(0.01)
            second = await client.get(url)
            assert [each.headers["x-neumeta-cache"] for each in (first, second)] == [
                "computed",
                "redis",
            ]
            assert first.content == second.content and second.headers["repr-digest"]
            assert (await client.get("/readyz")).json()["status"] == "ready"
            server.kill()
            for _ in range(5):
                third = await client.get(url)
                assert third.status_code == 200 and third.content == first.content
                assert third.headers["x-neumeta-cache"] == "computed"
                while app.state.cache.flights:
                    await asyncio.sleep(0.01)
            ready = await client.get("/readyz")
            assert ready.status_code == 200 and ready.json()["status"] == "degraded"
            server.start()
            while (await client.get("/readyz")).json()["status"] != "ready":
                await asyncio.sleep(0.05)

    run(check())


def test_a_full_redis_refuses_and_nobody_notices(tmp_path: Path, models: Path) -> None:
    server = RedisServer(tmp_path, "--maxmemory", "100kb", "--maxmemory-policy", "noeviction")

    async def check() -> None:
        async with tier(server.url) as shared, cached(shared) as cache:
            for number in range(3):
                key = hashlib.sha256(bytes([number])).hexdigest()
                body, origin = await cache.get(key, HEAD, 20, lambda: iter([b"0123456789"]))
                assert origin == "computed" and await read(body) == HEAD + b"0123456789"
            await cache.close()
            assert value(shared.metrics, "redis_errors_total", operation="lease") == 3
            assert value(shared.metrics, "redis_errors_total", operation="set") == 3
            assert not shared.open  # it answers, and what it has can still be read

    try:
        run(check())
    finally:
        server.kill()


async def herd(ports: list[int], path: str, count: int) -> list[Answer | BaseException]:
    asked = (fetch(ports[number % len(ports)], path) for number in range(count))
    return await asyncio.gather(*asked, return_exceptions=True)


@pytest.fixture(scope="module")
def fleet(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RedisServer, list[Service]]]:
    """Two replicas without a memory tier of their own, and the Redis they share."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    flags = ("--redis-url", server.url, "--redis-pause", "0.1", "--cache-bytes", "0")
    try:
        with replicas(2, models, *flags) as pair:
            yield server, pair
    finally:
        server.kill()


def test_two_replicas_a_hundred_clients_one_materialization(
    fleet: tuple[RedisServer, list[Service]],
) -> None:
    _, pair = fleet

    async def check() -> None:
        answers = await herd([each.port for each in pair], "/weights/lenet?samples=64", 100)
        assert all(isinstance(answer, Answer) and answer.status == 200 for answer in answers)
        assert len({answer.sha256 for answer in answers if isinstance(answer, Answer)}) == 1
        assert sum([await each.metric(SAMPLED) for each in pair]) == 1

    run(check())


def test_the_holder_is_killed_and_the_other_replica_answers(
    server: RedisServer, models: Path
) -> None:
    async def check(pair: list[Service]) -> None:
        path = "/weights/lenet?samples=800"
        halves = [asyncio.create_task(herd([each.port], path, 30)) for each in pair]
        won = 'neumeta_lease_total{outcome="won"}'
        while not any(holders := [await each.metric(won) for each in pair]):
            await asyncio.sleep(0.02)
        assert not any([await each.metric(SAMPLED) for each in pair])  # it is mid-sampling
        holder = holders.index(1)
        pair[holder].kill()
        answers = await halves[1 - holder]
        assert all(isinstance(answer, Answer) and answer.status == 200 for answer in answers)
        assert len({answer.sha256 for answer in answers if isinstance(answer, Answer)}) == 1
        assert await pair[1 - holder].metric(SAMPLED) == 1
        await halves[holder]

    flags = ("--redis-url", server.url, "--redis-lease", "1", "--max-samples", "4096")
    with replicas(2, models, *flags) as pair:
        run(check(pair))


def test_no_request_fails_while_redis_is_killed_hangs_and_returns(
    fleet: tuple[RedisServer, list[Service]],
) -> None:
    server, (replica, _) = fleet

    async def check() -> None:
        answers: list[Answer] = []
        ending = False

        async def load(offset: int) -> None:
            number = offset
            while not ending:
                number += 1
                path = f"/weights/lenet?width={(8 + number % 25) / 32}"
                answers.append(await fetch(replica.port, path))
                await asyncio.sleep(0.02)

        loads = [asyncio.create_task(load(8 * each)) for each in range(3)]
        await asyncio.sleep(0.5)
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(3)
        assert await replica.metric("neumeta_circuit_open") == 1
        server.signal(signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert await replica.metric("neumeta_circuit_open") == 0
        server.kill()
        await asyncio.sleep(0.5)
        server.start()
        await asyncio.sleep(0.5)
        ending = True
        await asyncio.gather(*loads)
        assert len(answers) > 50 and {answer.status for answer in answers} == {200}
        origins = {answer.headers["x-neumeta-cache"] for answer in answers}
        assert {"redis", "computed"} <= origins

    run(check())
