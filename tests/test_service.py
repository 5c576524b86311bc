"""The HTTP contract, with the application inside: bytes, ranges, strictness, one flight per key."""

from __future__ import annotations

import asyncio
import hashlib
import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import torch
from anyio.from_thread import start_blocking_portal
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load as load_bytes
from safetensors.torch import save

from neumeta import checkpoint
from neumeta import network as device_network
from neumeta.sample import sample
from tests.conftest import lenet, served


@pytest.fixture(scope="module")
def manifold_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "lenet.safetensors"
    checkpoint.write(lenet(), path)
    return path


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def test_post_get_and_the_library_write_the_same_bytes(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            post = await client.post("/weights", json={"arch": "lenet", "width": 0.5})
            get = await client.get("/weights/lenet?width=0.5")
            canonical = await client.get(post.headers["content-location"])
        manifold = checkpoint.read(manifold_file)
        tensors = dict(sample(manifold, manifold.space.architecture(0.5)))
        header = json.loads(post.content[8 : 8 + int.from_bytes(post.content[:8], "little")])
        assert post.content == save(tensors, header["__metadata__"])
        assert get.content == canonical.content == post.content
        assert get.headers["etag"] == post.headers["etag"] == canonical.headers["etag"]
        assert int(post.headers["content-length"]) == len(post.content)
        digest = b64encode(hashlib.sha256(get.content).digest()).decode()
        assert get.headers["repr-digest"] == f"sha-256=:{digest}:"
        assert (post.headers["x-neumeta-cache"], get.headers["x-neumeta-cache"]) == (
            "computed",
            "memory",
        )

    run(check())


def test_widths_that_round_alike_are_one_request(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            a = await client.post("/weights", json={"arch": "lenet", "width": 0.5})
            b = await client.post("/weights", json={"arch": "lenet", "width": 0.5000001})
            c = await client.post("/weights", json={"arch": "lenet", "width": [0.5, 0.5, 0.5]})
            d = await client.post("/weights", json={"arch": "lenet", "width": 0.6})
        assert a.headers["etag"] == b.headers["etag"] == c.headers["etag"] != d.headers["etag"]
        assert b.headers["x-neumeta-cache"] == c.headers["x-neumeta-cache"] == "memory"

    run(check())


def test_equal_requests_give_equal_bytes_and_other_seeds_others(manifold_file: Path) -> None:
    async def check() -> None:
        bodies = {}
        for replica in range(2):
            async with served(manifold_file) as (client, _):
                for seed in (0, 1):
                    asked = {"arch": "lenet", "width": 0.4, "seed": seed, "samples": 3}
                    bodies[replica, seed] = (await client.post("/weights", json=asked)).content
        assert bodies[0, 0] == bodies[1, 0] and bodies[0, 1] == bodies[1, 1]
        assert bodies[0, 0] != bodies[0, 1]

    run(check())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_what_is_pulled_is_a_network(manifold_file: Path, tmp_path: Path, dtype: str) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            asked = {"arch": "lenet", "width": 0.4, "dtype": dtype}
            answer = await client.post("/weights", json=asked)
        (tmp_path / "net.safetensors").write_bytes(answer.content)
        net = device_network.load(tmp_path / "net.safetensors")
        kind = torch.float32 if dtype == "int8" else getattr(torch, dtype)
        assert net(torch.rand(2, 1, 8, 8).to(kind)).shape == (2, 10)
        assert next(net.parameters()).dtype == kind

    run(check())


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-7", 0, 8),
        ("bytes=100-", 100, None),
        ("bytes=-10", -10, None),
        ("bytes=5-99999999", 5, None),
    ],
)
def test_ranges(manifold_file: Path, asked: str, start: int, stop: int | None) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            # Cold on purpose: a range is served from a file that is still being made.
            part = await client.get("/weights/lenet?width=0.5", headers={"Range": asked})
            whole = await client.get("/weights/lenet?width=0.5")
            assert part.status_code == 206
            assert part.content == whole.content[start:stop]
            first = start % len(whole.content)
            last = first + len(part.content) - 1
            assert part.headers["content-range"] == f"bytes {first}-{last}/{len(whole.content)}"
            other = {"Range": asked, "If-Range": '"another"'}
            assert (await client.get("/weights/lenet?width=0.5", headers=other)).status_code == 200
            same = {"Range": asked, "If-Range": whole.headers["etag"]}
            assert (await client.get("/weights/lenet?width=0.5", headers=same)).status_code == 206

    run(check())


def test_range_outside_not_modified_and_head(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, app):
            head = await client.head("/weights/lenet?width=0.5")
            assert head.status_code == 200 and head.content == b""
            assert not app.state.cache.finished and not app.state.cache.flights
            tag = {"If-None-Match": head.headers["etag"]}
            fresh = await client.get("/weights/lenet?width=0.5", headers=tag)
            assert fresh.status_code == 304 and not app.state.cache.finished
            whole = await client.get("/weights/lenet?width=0.5")
            assert head.headers["content-length"] == str(len(whole.content))
            assert head.headers["etag"] == whole.headers["etag"]
            beyond = {"Range": f"bytes={len(whole.content)}-"}
            refused = await client.get("/weights/lenet?width=0.5", headers=beyond)
            assert refused.status_code == 416
            assert refused.headers["content-range"] == f"bytes */{len(whole.content)}"
            for ignored in ("bytes=0-1,4-5", "lines=1-2", "bytes=9-3"):
                answer = await client.get("/weights/lenet?width=0.5", headers={"Range": ignored})
                assert answer.status_code == 200 and answer.content == whole.content

    run(check())


def test_many_clients_one_materialization(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            asked = {"arch": "lenet", "width": 0.7}
            answers = await asyncio.gather(
                *(client.post("/weights", json=asked) for _ in range(50))
            )
            scraped = (await client.get("/metrics")).text
        assert len({answer.content for answer in answers}) == 1
        assert 'neumeta_sampling_seconds_count{stage="sample"} 1.0' in scraped

    run(check())


def test_the_cache_stays_within_its_bytes(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file, cache_bytes=100_000) as (client, app):
            for channels in range(8, 33):
                answer = await client.get(f"/weights/lenet?width={channels / 32}")
                assert answer.status_code == 200
                cache = app.state.cache
                assert cache.bytes <= 100_000
                assert cache.bytes == sum(len(body.data) for body in cache.finished.values())
            assert cache.finished

    run(check())


def test_plan_models_and_probes(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, app):
            plan = (await client.post("/plan", json={"arch": "lenet", "width": 0.5})).json()
            assert not app.state.cache.finished
            body = (await client.get("/weights/lenet?width=0.5")).content
            assert plan["bytes"] == len(body)
            tensors = load_bytes(body)
            assert plan["parameters"] == sum(tensor.numel() for tensor in tensors.values())
            budget = {"arch": "lenet", "budget": {"max_params": plan["parameters"]}}
            fits = (await client.post("/plan", json=budget)).json()
            assert fits["parameters"] <= plan["parameters"]
            assert fits["channels"] == plan["channels"]
            tight = {"arch": "lenet", "budget": {"max_bytes": 10}}
            assert (await client.post("/plan", json=tight)).status_code == 422
            served_names = [m["arch"] for m in (await client.get("/models")).json()["models"]]
            assert served_names == ["lenet"]
            assert (await client.get("/models/lenet")).json()["width"] == [0.25, 1.0]
            for path in ("/livez", "/readyz", "/metrics", "/docs"):
                assert (await client.get(path)).status_code == 200

    run(check())


def test_extrapolation_must_be_asked_for_and_is_marked(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            asked: dict[str, Any] = {"arch": "lenet", "width": 0.125}
            refused = await client.post("/weights", json=asked)
            assert refused.status_code == 422
            assert "extrapolate" in refused.json()["errors"][0]["allowed"]
            answer = await client.post("/weights", json={**asked, "extrapolate": True})
            assert answer.status_code == 200
            assert answer.headers["x-neumeta-extrapolated"] == "true"

    run(check())


BAD_BODIES: dict[str, tuple[bytes, str | None]] = {
    "unknown arch": (b'{"arch":"vgg16"}', "arch"),
    "no arch": (b'{"width":0.5}', "arch"),
    "width 0": (b'{"arch":"lenet","width":0}', "width"),
    "negative": (b'{"arch":"lenet","width":-0.5}', "width"),
    "NaN": (b'{"arch":"lenet","width":NaN}', "width"),
    "infinity": (b'{"arch":"lenet","width":1e999}', "width"),
    "text": (b'{"arch":"lenet","width":"0.5"}', "width"),
    "true": (b'{"arch":"lenet","width":true}', "width"),
    "huge": (b'{"arch":"lenet","width":1000000000}', "width"),
    "400 digits": (b'{"arch":"lenet","width":' + b"9" * 400 + b"}", "width"),
    "5000 digits": (b'{"arch":"lenet","width":' + b"9" * 5000 + b"}", None),
    "outside": (b'{"arch":"lenet","width":0.1}', "width"),
    "an unknown group": (b'{"arch":"lenet","width":{"conv9":0.5}}', "width"),
    "a group of text": (b'{"arch":"lenet","width":{"conv1":"0.5"}}', "width"),
    "no group": (b'{"arch":"lenet","width":{}}', "width"),
    "65 groups": (
        b'{"arch":"lenet","width":{' + b",".join(b'"g%d":1' % n for n in range(65)) + b"}}",
        "width",
    ),
    "two widths of three": (b'{"arch":"lenet","width":[0.5,0.5]}', "width"),
    "empty list": (b'{"arch":"lenet","width":[]}', "width"),
    "list with NaN": (b'{"arch":"lenet","width":[0.5,NaN,0.5]}', "width"),
    "depth 0": (b'{"arch":"lenet","depth":[0]}', "depth"),
    "depth": (b'{"arch":"lenet","depth":[3,3]}', "depth"),
    "depth in floats": (b'{"arch":"lenet","depth":[3.0]}', "depth"),
    "unknown field": (b'{"arch":"lenet","widht":0.5}', "widht"),
    "surrogate field": (b'{"arch":"lenet","\\ud800":1}', None),
    "surrogate": (b'{"arch":"\\ud800"}', None),
    "null byte": (b'{"arch":"lenet\\u0000"}', "arch"),
    "dtype": (b'{"arch":"lenet","dtype":"int4"}', "dtype"),
    "samples 0": (b'{"arch":"lenet","samples":0}', "samples"),
    "many samples": (b'{"arch":"lenet","samples":4000}', "samples"),
    "seed": (b'{"arch":"lenet","seed":-1}', "seed"),
    "budget and width": (b'{"arch":"lenet","width":0.5,"budget":{"max_params":9}}', "budget"),
    "empty budget": (b'{"arch":"lenet","budget":{}}', "budget"),
    "budget of text": (b'{"arch":"lenet","budget":{"max_params":"9"}}', "budget"),
    "not JSON": (b'{"arch":', "body"),
    "not an object": (b"[]", None),
    "null": (b"null", None),
    "empty": (b"", "body"),
    "not UTF-8": (b'{"arch":"\xff"}', None),
    "deep": (b"[" * 5000, None),
    "long list": (b'{"arch":"lenet","width":[' + b"1," * 8000 + b"1]}", "width"),
    "a million": (b'{"arch":"lenet","depth":[' + b"3," * 1_000_000 + b"3]}", "body"),
    "2 MB": (b'{"arch":"' + b"a" * (2 << 20) + b'"}', "body"),
}


@pytest.mark.parametrize("name", list(BAD_BODIES))
@pytest.mark.parametrize("path", ["/weights", "/plan"])
def test_bad_bodies_are_refused_by_name(manifold_file: Path, name: str, path: str) -> None:
    raw, expected = BAD_BODIES[name]

    async def check() -> None:
        async with served(manifold_file) as (client, app):
            answer = await client.post(
                path, content=raw, headers={"content-type": "application/json"}
            )
            assert 400 <= answer.status_code < 500, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            told = answer.json()
            assert told["status"] == answer.status_code and "Traceback" not in answer.text
            assert len(answer.content) < 4000
            if expected:
                assert expected in [error["field"] for error in told["errors"]]
                assert all(error["allowed"] for error in told["errors"])
            assert not app.state.cache.finished and not app.state.cache.flights

    run(check())


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("width=0", "width"),
        ("width=-1", "width"),
        ("width=nan", "width"),
        ("width=1e999", "width"),
        ("width=", "width"),
        ("width=0.5&width=0.6", "width"),
        ("width=0.5;drop", "width"),
        ("width=conv9:0.5", "width"),
        ("width=conv1:0.5,conv1:0.5", "width"),
        ("width=conv1:nan", "width"),
        ("width=conv1:0.5,0.5", "width"),
        ("depth=3,3", "depth"),
        ("depth=0", "depth"),
        ("dtype=int4", "dtype"),
        ("samples=1.5", "samples"),
        ("seed=" + "9" * 30, "seed"),
        ("extrapolate=1", "extrapolate"),
        ("widht=0.5", "widht"),
        ("arch=other", "arch"),
        ("budget=9", "budget"),
        ("width=" + ",".join(["0.5"] * 5000), "width"),
    ],
)
def test_bad_queries_are_refused_by_name(manifold_file: Path, query: str, name: str) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            answer = await client.get(f"/weights/lenet?{query}")
            assert answer.status_code == 422, answer.text
            assert name in [error["field"] for error in answer.json()["errors"]]

    run(check())


def test_wrong_paths_methods_and_types_are_problems(manifold_file: Path) -> None:
    async def check() -> None:
        async with served(manifold_file) as (client, _):
            for method, path, status in (
                ("GET", "/nothing", 404),
                ("GET", "/models/vgg", 404),
                ("GET", "/weights/vgg", 404),
                ("PUT", "/weights/lenet", 405),
                ("GET", "/weights", 405),
            ):
                answer = await client.request(method, path)
                assert answer.status_code == status
                assert answer.headers["content-type"] == "application/problem+json"
            xml = {"content-type": "text/xml"}
            refused = await client.post("/weights", content=b"<a/>", headers=xml)
            assert refused.status_code == 415

    run(check())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=10,
)
FIELDS = ["arch", "width", "depth", "dtype", "samples", "seed", "extrapolate", "budget"]


def test_no_body_hurts(manifold_file: Path) -> None:
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(served(manifold_file)) as (client, _),
    ):

        @hypothesis_settings(max_examples=200, deadline=None)
        @given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.booleans())
        def answered(body: dict[str, Any], named: bool) -> None:
            body = {**body, "arch": "lenet"} if named else body
            content = json.dumps(body).encode()
            answer = portal.call(lambda: client.post("/plan", content=content))
            assert answer.status_code == 200 or 400 <= answer.status_code < 500

        answered()
