"""HTTP details beside the contract: HEAD, header-only ranges, refusals, OpenAPI, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from safetensors.torch import save

from neumeta import checkpoint, wire
from neumeta.sample import sample
from service.cli import serve, settings_from
from service.request import ALLOWED
from service.settings import Settings, linked
from tests.conftest import lenet, served
from tests.test_service_engine import grid, space


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    for manifold in (lenet(), grid(space("resnet20")), grid(space("resnet-mnist"))):
        checkpoint.write(manifold, path / f"{manifold.space.name}.safetensors")
    return path


@pytest.mark.parametrize(
    ("arch", "asked"),
    [
        ("lenet", {"width": [0.3, 0.9, 0.5]}),
        ("resnet20", {"width": 0.4}),
        ("resnet20", {"width": 0.5, "dtype": "bfloat16"}),
        ("resnet-mnist", {"depth": [3, 1]}),
    ],
)
def test_every_kind_of_space_gives_the_librarys_bytes(
    folder: Path, arch: str, asked: dict[str, Any]
) -> None:
    async def check() -> None:
        async with served(folder) as (client, app):
            answer = await client.post("/weights", json={"arch": arch, **asked})
            again = await client.get(answer.headers["content-location"])
            manifold = app.state.engine.manifolds[arch]
        here = manifold.space
        architecture = here.architecture(asked.get("width", here.width[1]), asked.get("depth"))
        assert answer.headers["x-neumeta-architecture"] == architecture.key
        dtype = getattr(torch, asked.get("dtype", "float32"))
        tensors = {
            name: tensor.to(dtype).contiguous() for name, tensor in sample(manifold, architecture)
        }
        header = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
        assert answer.content == save(tensors, header["__metadata__"]) == again.content

    asyncio.run(check())


def test_header_only_reads_sample_nothing(folder: Path) -> None:
    """The reading of a header as the safetensors documentation describes it."""

    async def check() -> None:
        async with served(folder) as (client, app):
            first = await client.get("/weights/lenet?width=0.5", headers={"Range": "bytes=0-7"})
            count = int.from_bytes(first.content, "little")
            ranged = {"Range": f"bytes=8-{7 + count}"}
            header = await client.get("/weights/lenet?width=0.5", headers=ranged)
            assert first.status_code == header.status_code == 206
            assert header.headers["x-neumeta-cache"] == "plan"
            assert json.loads(header.content)["conv1.weight"]["shape"] == [16, 1, 3, 3]
            assert not app.state.cache.flights and not app.state.cache.finished

    asyncio.run(check())


def test_head_states_the_whole_file_whatever_the_range(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, app):
            head = await client.head("/weights/lenet?width=0.5", headers={"Range": "bytes=0-7"})
            assert head.status_code == 200 and "repr-digest" not in head.headers
            body = (await client.get("/weights/lenet?width=0.5")).content
            assert head.headers["content-length"] == str(len(body))
            later = await client.head("/weights/lenet?width=0.5")
            assert re.fullmatch(r"sha-256=:[\w+/]{43}=:", later.headers["repr-digest"])
            for path in ("/livez", "/readyz", "/models", "/models/lenet", "/metrics"):
                assert (await client.head(path)).status_code == 200

    asyncio.run(check())


def test_every_answer_about_a_file_says_its_digest_once_it_is_known(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, app):
            path = "/weights/lenet?width=0.5"
            asked = {"arch": "lenet", "width": 0.5}
            tag = (await client.head(path)).headers["etag"]
            same, head, last = {"If-None-Match": tag}, {"Range": "bytes=0-7"}, {"Range": "bytes=-9"}

            async def told() -> list[Any]:
                return [
                    await client.get(path, headers=same),
                    await client.head(path, headers=same),
                    await client.head(path),
                    await client.get(path, headers=head),
                ]

            plan = (await client.post("/plan", json=asked)).json()
            assert plan["repr_digest"] is None and not app.state.cache.finished
            for answer in await told():
                assert "repr-digest" not in answer.headers
            cold = await client.get(path)
            assert "repr-digest" not in cold.headers
            # No cache may keep what could never be vouched for.
            assert cold.headers["cache-control"] == "no-store"
            assert cold.headers["x-accel-expires"] == "0"
            digest = b64encode(hashlib.sha256(cold.content).digest()).decode()
            for dropped in (False, True):
                if dropped:  # the bytes are gone, their digest is not
                    app.state.cache.finished.clear()
                    app.state.cache.bytes = 0
                answers = [
                    *await told(),
                    await client.get(path, headers=last),
                    await client.get(path),
                    await client.get(path),
                    await client.post("/weights", json=asked),
                ]
                statuses = [each.status_code for each in answers]
                assert statuses == [304, 304, 200, 206, 206, 200, 200, 200]
                for answer in answers:
                    assert answer.headers.get_list("repr-digest") == [f"sha-256=:{digest}:"]
                    assert answer.headers["cache-control"] == "public, no-cache"
                    assert "x-accel-expires" not in answer.headers
                plan = (await client.post("/plan", json=asked)).json()
                assert plan["repr_digest"] == f"sha-256=:{digest}:"

    asyncio.run(check())


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ('W/"TAG"', 304),
        ('"other", "TAG"', 304),
        ("*", 304),
        ('"other"', 200),
    ],
)
def test_if_none_match_compares_weakly(folder: Path, header: str, status: int) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            tag = (await client.head("/weights/lenet")).headers["etag"]
            asked = {"If-None-Match": header.replace('"TAG"', tag)}
            answer = await client.get("/weights/lenet", headers=asked)
            assert answer.status_code == status
            assert answer.headers["etag"] == tag
            if status == 304:
                assert answer.content == b"" and "content-length" not in answer.headers

    asyncio.run(check())


@pytest.mark.parametrize("field", ["if-range", "range"])
def test_a_weak_if_range_or_a_second_range_gives_the_whole_file(folder: Path, field: str) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            tag = (await client.head("/weights/lenet")).headers["etag"]
            asked = {"Range": "bytes=0-9", "If-Range": "W/" + tag}
            if field == "range":
                asked = {"Range": "bytes=0-9,20-29"}
            answer = await client.get("/weights/lenet", headers=asked)
            assert answer.status_code == 200
            assert len(answer.content) == int(answer.headers["content-length"]) > 10

    asyncio.run(check())


def test_conditions_and_ranges_mean_nothing_to_post(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            tag = (await client.head("/weights/lenet")).headers["etag"]
            for name, value in (("If-None-Match", tag), ("Range", "bytes=0-9")):
                answer = await client.post(
                    "/weights", json={"arch": "lenet"}, headers={name: value}
                )
                assert answer.status_code == 200
                assert len(answer.content) == int(answer.headers["content-length"]) > 10

    asyncio.run(check())


def test_samplers_have_the_threads_that_the_etag_names(folder: Path) -> None:
    async def check() -> None:
        for threads in (3, 1):
            async with served(folder, threads=threads) as (client, app):
                weights, seen = app.state.engine.weights, []

                def counted(
                    job: Any, weights: Any = weights, seen: list[int] = seen
                ) -> Iterator[bytes]:
                    seen.append(torch.get_num_threads())
                    yield from weights(job)

                app.state.engine.weights = counted
                assert (await client.get("/weights/lenet")).status_code == 200
                assert seen == [threads]

    before = torch.get_num_threads()
    try:
        asyncio.run(check())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("asked", ["bytes=-0", "bytes=99999999-", "BYTES=99999999-999999999"])
def test_a_range_outside_says_what_is_inside(folder: Path, asked: str) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            answer = await client.get("/weights/lenet", headers={"Range": asked})
            total = (await client.head("/weights/lenet")).headers["content-length"]
            assert answer.status_code == 416
            assert answer.headers["content-range"] == f"bytes */{total}"
            assert answer.json()["errors"][0]["field"] == "range"

    asyncio.run(check())


def test_methods_paths_and_queries_nobody_has_are_problems(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            for method, path, status, field in (
                ("PUT", "/weights/lenet", 405, "path"),
                ("GET", "/plan", 405, "path"),
                ("GET", "/" + "a" * 3000, 404, "path"),
                ("GET", "/weights/%ED%A0%80", 404, "arch"),
                ("GET", "/weights/" + "%E2%98%83" * 50, 404, "arch"),
                ("GET", "/weights/" + "%E2%98%83" * 65, 422, "arch"),
                ("GET", "/models?page=2", 422, "page"),
                ("POST", "/weights?width=0.5", 422, "width"),
                ("POST", "/plan?x=" + "9" * 5000, 422, "x"),
                ("GET", "/weights/lenet?" + "z" * 4000 + "=1", 422, None),
                ("GET", "/weights/lenet?seed=%EF%BC%91", 422, "seed"),
            ):
                answer = await client.request(method, path)
                assert answer.status_code == status, (path[:40], answer.text)
                assert answer.headers["content-type"] == "application/problem+json"
                told = answer.json()
                assert set(told) == {"type", "title", "status", "detail", "errors"}
                for error in told["errors"]:
                    assert set(error) == {"field", "given", "allowed"}
                    assert len(error["given"]) <= 80 and len(error["field"]) <= 80
                assert len(told["detail"]) < 400 and len(answer.content) < 1500
                assert field is None or told["errors"][0]["field"] == field
            allowed = (await client.put("/weights/lenet")).headers["allow"]
            assert allowed == "GET, HEAD"

    asyncio.run(check())


def test_a_fault_in_a_route_is_a_problem_without_a_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with served(folder) as (client, app):
            app.state.engine.describe = lambda job: 1 / 0
            answer = await client.post("/plan", json={"arch": "lenet"})
            assert answer.status_code == 500
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["detail"] == "internal error"
            assert "ZeroDivision" not in answer.text

    asyncio.run(check())


def test_beyond_the_queue_the_answer_is_429(folder: Path) -> None:
    async def check() -> None:
        async with served(folder, max_flights=1) as (client, app):
            released = threading.Event()
            weights = app.state.engine.weights

            def slow(job: Any) -> Iterator[bytes]:
                assert released.wait(20)
                yield from weights(job)

            app.state.engine.weights = slow
            first = asyncio.create_task(client.get("/weights/lenet?width=0.5"))
            while not app.state.cache.flights:
                await asyncio.sleep(0.01)
            refused = await client.get("/weights/lenet?width=0.75")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["status"] == 429
            assert (await client.get("/livez")).status_code == 200
            released.set()
            assert (await first).status_code == 200
            assert (await client.get("/weights/lenet?width=0.75")).status_code == 200

    asyncio.run(check())


def test_the_openapi_document_names_every_parameter(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            document = (await client.get("/openapi.json")).json()
            get = document["paths"]["/weights/{arch}"]["get"]
            assert {each["name"] for each in get["parameters"]} == {*ALLOWED, "etag"} - {"budget"}
            assert set(document["paths"]["/weights"]) == {"post"}
            assert set(get["responses"]) >= {"200", "206", "304", "404", "416", "422"}

    asyncio.run(check())


def test_metrics_have_closed_labels(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            for width in (0.5, 0.6, 0.5):
                await client.get(f"/weights/lenet?width={width}")
            await client.get("/" + "x" * 50)
            await client.get("/weights/nobody")
            text = (await client.get("/metrics")).text
        found = {}
        for family in text_string_to_metric_families(text):
            assert family.name.startswith(("neumeta_", "process_")) and family.documentation
            for each in family.samples:
                found[each.name, tuple(sorted(each.labels.items()))] = each.value
        answers = {
            dict(labels)["tier"]: value
            for (name, labels), value in found.items()
            if name == "neumeta_cache_answers_total"
        }
        none = {"plan": 0.0, "redis": 0.0, "coalesced": 0.0}
        assert answers == {"computed": 2.0, "memory": 1.0, **none}
        routes = {dict(labels).get("route") for _, labels in found}
        assert routes <= {None, "/weights", "other", "/metrics"}
        assert found["neumeta_requests_total", (("route", "other"), ("status", "404"))] == 1.0
        assert found["neumeta_cache_bytes", ()] > 0

    asyncio.run(check())


def test_a_budget_and_its_plan_agree_with_the_file(folder: Path) -> None:
    async def check() -> None:
        async with served(folder) as (client, _):
            asked = {"arch": "resnet-mnist", "budget": {"max_bytes": 260_000}}
            plan = (await client.post("/plan", json=asked)).json()
            larger = {"arch": "resnet-mnist", "depth": [plan["depth"][0], plan["depth"][1] + 1]}
            assert (await client.post("/plan", json=larger)).json()["bytes"] > 260_000
            answer = await client.post("/weights", json=asked)
            assert len(answer.content) == plan["bytes"] <= 260_000
            assert answer.headers["etag"] == plan["etag"]

    asyncio.run(check())


def test_the_service_package_imports_no_training_and_the_client_no_service_libraries() -> None:
    code = (
        "import sys; import {}; "
        "print(sorted({{name.partition('.')[0] for name in sys.modules}} & {{'training', 'torch',"
        " 'fastapi', 'starlette', 'pydantic', 'uvicorn', 'redis', 'prometheus_client'}}))"
    )
    for module, expected in (("service", "[]"), ("neumeta.command", "[]")):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == expected
    ran = subprocess.run(
        [sys.executable, "-c", code.format("service.cli")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "training" not in ran.stdout and "fastapi" in ran.stdout


FIRST = """
import asyncio, json, sys
from service.app import create_app
from service.settings import Settings

async def main():
    app, sent = create_app(Settings(models=sys.argv[1], device="cpu")), []
    asked = [{"type": "http.request", "body": b'{"arch": "lenet", "width": 0.5}'}]

    async def receive():
        return asked.pop() if asked else await asyncio.get_running_loop().create_future()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1",
             "method": "POST", "scheme": "http", "path": "/weights", "raw_path": b"/weights",
             "query_string": b"", "root_path": "", "headers": [], "client": ("127.0.0.1", 1)}
    async with app.router.lifespan_context(app):
        before = set(sys.modules)
        await app(scope, receive, send)
        print(json.dumps([sent[0]["status"], sorted(set(sys.modules) - before)]))

asyncio.run(main())
"""


def test_the_first_answer_loads_no_module_that_a_start_could_have_loaded(folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FIRST, str(folder)], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout.splitlines()[-1]) == [200, []]


COLLECTED = """
import gc, sys
from service import cli

cli.Server.run = lambda server: print(gc.get_freeze_count(), len(gc.get_objects()))
cli.serve(["--models", sys.argv[1]])
"""


def test_a_collection_while_requests_run_looks_through_little_of_what_a_start_loaded(
    folder: Path,
) -> None:
    """A full one took 0.15 s, at any moment of the first requests."""
    ran = subprocess.run(
        [sys.executable, "-c", COLLECTED, str(folder)], capture_output=True, text=True, check=True
    )
    kept_out, looked_through = map(int, ran.stdout.split())
    assert kept_out > 50_000 and looked_through < kept_out / 20


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "99999"], "port"),
        (["--cache-bytes", "lots"], "cache_bytes"),
        (["--models", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--log-level", "loud"], "log_level"),
        (["--port", "tcp://10.96.3.4:80"], "port"),
        (["--root-path", "fleet"], "root_path"),
        (["--root-path", "/fleet/"], "root_path"),
        (["--root-path", "/weights/a"], "root_path"),
        (["--root-path", "/a b"], "root_path"),
    ],
)
def test_a_bad_flag_is_one_line(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve(flags) == 2
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1


def test_what_kubernetes_puts_beside_the_settings_is_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    links = {
        "NEUMETA_PORT": "tcp://10.96.3.4:80",
        "NEUMETA_SERVICE_HOST": "10.96.3.4",
        "NEUMETA_SERVICE_PORT": "80",
        "NEUMETA_SERVICE_PORT_HTTP": "80",
        "NEUMETA_PORT_80_TCP": "tcp://10.96.3.4:80",
        "NEUMETA_PORT_80_TCP_ADDR": "10.96.3.4",
        "NEUMETA_PORT_80_TCP_PORT": "80",
        "NEUMETA_PORT_80_TCP_PROTO": "tcp",
        # Another Service beside it, `neumeta-redis`.
        "NEUMETA_REDIS_PORT": "tcp://10.96.3.5:6379",
        "NEUMETA_REDIS_SERVICE_HOST": "10.96.3.5",
        "NEUMETA_REDIS_PORT_6379_TCP_PORT": "6379",
    }
    for name, value in links.items():
        monkeypatch.setenv(name, value)
    settings = settings_from([])
    assert (settings.port, settings.redis_url) == (8000, "")
    assert settings_from(["--port", "81"]).port == 81
    assert linked(links) == sorted(links)
    ours = {f"NEUMETA_{name.upper()}": "1" for name in Settings.model_fields}
    assert linked(ours | {"NEUMETA_URL": "http://x", "PORT": "tcp://x", "NEUMETA_PORT": "80"}) == []
    monkeypatch.setenv("NEUMETA_PORT", "tcp")
    with pytest.raises(ValidationError):
        settings_from([])


def test_every_flag_has_an_environment_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUMETA_MAX_SAMPLES", "9")
    monkeypatch.setenv("NEUMETA_SAMPLERS", "3")
    assert settings_from([]).max_samples == 9
    assert settings_from(["--samplers", "5"]).samplers == 5
    for name, entry in Settings.model_fields.items():
        assert entry.description, name


def test_a_weight_beyond_the_dtype_is_never_sent_as_an_infinity() -> None:
    big = torch.tensor([1.0, 70000.0])
    for dtype in ("float32", "bfloat16"):
        assert wire.encode("conv1.weight", big, dtype)
    with pytest.raises(ValueError, match="conv1.weight: a weight of 7e.04 is beyond float16's"):
        wire.encode("conv1.weight", big, "float16")
    with pytest.raises(ValueError, match="beyond bfloat16's"):
        wire.encode("conv1.weight", torch.tensor([3.4e38]), "bfloat16")
    with pytest.raises(ValueError, match="conv1.bias: sampled weights are not finite"):
        wire.encode("conv1.bias", torch.tensor([float("nan")]), "float16")
