"""The service's ONNX models and int8 files: what holds for any other file holds for them."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import httpx
import onnxruntime
import pytest
import torch

from neumeta import checkpoint, network, onnx
from neumeta.manifold import Contract, Manifold, roles
from neumeta.representation import build
from neumeta.space import Space
from tests.conftest import served
from training.trace import trace

WHOLE = "/weights/lenet?width=0.5&format=onnx"
INT8 = "/weights/lenet?width=0.5&dtype=int8"


def outputs(raw: bytes, images: torch.Tensor) -> torch.Tensor:
    """What ONNX Runtime makes of these images."""
    here = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return torch.from_numpy(here.run(None, {"input": images.numpy()})[0])


def test_a_model_is_had_by_body_and_by_url_and_computes_what_the_weights_do(
    file: Path, tmp_path: Path
) -> None:
    async def check() -> tuple[bytes, bytes]:
        async with served(file) as (client, _):
            asked = {"arch": "lenet", "width": 0.5}
            weights = await client.post("/weights", json=asked)
            posted = await client.post("/weights", json={**asked, "format": "onnx"})
            got = await client.get(WHOLE)
            assert posted.status_code == got.status_code == 200
            assert posted.content == got.content != weights.content
            assert posted.headers["content-type"] == "application/octet-stream"
            assert weights.headers["content-type"] == "application/vnd.safetensors"
            assert posted.headers["etag"] == got.headers["etag"] != weights.headers["etag"]
            location = got.headers["content-location"]
            assert "&format=onnx&" in location
            assert "format" not in weights.headers["content-location"]
            again = await client.get(location)
            assert again.content == got.content and again.headers["etag"] == got.headers["etag"]
            digest = b64encode(hashlib.sha256(got.content).digest()).decode()
            assert again.headers["repr-digest"] == f"sha-256=:{digest}:"
            return weights.content, got.content

    weights, model = asyncio.run(check())
    (tmp_path / "net.safetensors").write_bytes(weights)
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    wanted = network.load(tmp_path / "net.safetensors")(images)
    # Of the largest output: a small one is a difference of large terms, summed in another order.
    most = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(outputs(model, images), wanted, rtol=0, atol=most)


def test_a_models_plan_and_head_say_its_length_and_sample_nothing(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, app):
            asked = {"arch": "lenet", "width": 0.5, "dtype": "int8", "format": "onnx"}
            plan = (await client.post("/plan", json=asked)).json()
            assert (plan["format"], plan["dtype"]) == ("onnx", "int8")
            assert plan["repr_digest"] is None
            head = await client.head(plan["location"])
            assert (head.headers["content-length"], head.headers["etag"]) == (
                str(plan["bytes"]),
                plan["etag"],
            )
            start = await client.get(plan["location"], headers={"Range": "bytes=0-99"})
            assert start.status_code == 206 and start.headers["x-neumeta-cache"] == "plan"
            assert start.content.startswith(b"\x08\x08") and not app.state.cache.digests
            whole = await client.get(plan["location"])
            assert len(whole.content) == plan["bytes"]
            assert whole.content.startswith(start.content)
            models = (await client.get("/models/lenet")).json()
            assert models["formats"] == ["safetensors", "onnx"]
            assert models["dtypes"] == ["float32", "float16", "bfloat16", "int8"]
            exact = (await client.post("/plan", json={**asked, "dtype": "float32"})).json()
            assert plan["bytes"] < 0.33 * exact["bytes"] and plan["etag"] != exact["etag"]

    asyncio.run(check())


@pytest.mark.parametrize("path", [WHOLE, INT8, f"{INT8}&format=onnx"])
def test_a_files_first_bytes_come_before_the_first_weight(file: Path, path: str) -> None:
    """The sampler is never let begin: what is sent is what is known without it."""

    async def check() -> None:
        async with served(file) as (client, app):
            engine, held = app.state.engine, asyncio.Event()
            loop, weights = asyncio.get_running_loop(), engine.weights
            seen: list[bytes] = []

            def late(job: Any) -> Any:
                asyncio.run_coroutine_threadsafe(held.wait(), loop).result()
                yield from weights(job)

            engine.weights = late
            chunks = app.state.cache

            async def watch() -> None:
                while not chunks.flights:
                    await asyncio.sleep(0.01)
                (body,) = chunks.flights.values()
                async for part in body.read(0, len(body.head)):
                    seen.append(bytes(part))
                held.set()

            answer, _ = await asyncio.gather(client.get(path), watch())
            assert b"".join(seen) == answer.content[: sum(map(len, seen))] and len(seen[0]) > 1000

    asyncio.run(check())


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (WHOLE, "bytes=3000-"),
        (WHOLE, "bytes=100-5000"),
        (WHOLE, "bytes=-1"),
        (INT8, "bytes=3000-"),
        (f"{INT8}&format=onnx", "bytes=100-5000"),
        (INT8, "bytes=-1"),
    ],
)
def test_a_part_of_a_file_is_that_part_while_it_is_made_and_afterwards(
    file: Path, path: str, asked: str
) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            part = await client.get(path, headers={"Range": asked})
            whole = await client.get(path)
            again = await client.get(
                path, headers={"Range": asked, "If-Range": whole.headers["etag"]}
            )
            assert part.status_code == again.status_code == 206
            first, _, last = asked.removeprefix("bytes=").partition("-")
            wanted = whole.content[-1:] if not first else whole.content[int(first) :]
            if first and last:
                wanted = whole.content[int(first) : int(last) + 1]
            assert part.content == again.content == wanted
            kept = {"If-None-Match": whole.headers["etag"]}
            assert (await client.get(path, headers=kept)).status_code == 304

    asyncio.run(check())


@pytest.mark.parametrize("given", ["ONNX", "torch", ""])
def test_a_format_that_does_not_exist_is_refused_by_name(file: Path, given: str) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            answers: list[httpx.Response] = [
                await client.post("/weights", json={"arch": "lenet", "format": given}),
                await client.post("/plan", json={"arch": "lenet", "format": given}),
                await client.get("/weights/lenet", params={"format": given}),
            ]
            for answer in answers:
                assert answer.status_code == 422
                assert answer.json()["errors"] == [
                    {
                        "field": "format",
                        "given": repr(given),
                        "allowed": "'safetensors' or 'onnx'",
                    }
                ]

    asyncio.run(check())


def test_int8_of_a_network_with_nothing_to_make_smaller_is_refused_by_name(tmp_path: Path) -> None:
    class Tiny(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = torch.nn.Conv2d(1, 8, 3), torch.nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x).relu().mean((2, 3)))  # type: ignore[no-any-return]

    over = Space("tiny", trace(Tiny().eval(), torch.zeros(1, 1, 5, 5))[0], (0.5, 1.0))
    model = build("grid", {}, roles(over))
    contract = Contract((0.3,), (0.4,), ("a", "b", "c"))
    path = tmp_path / "tiny.safetensors"
    checkpoint.write(Manifold(over, model, "grid", {}, 0.0, 1, 64, contract), path)

    async def check() -> None:
        async with served(path) as (client, _):
            asked = {"arch": "tiny", "dtype": "int8"}
            for answer in (
                await client.post("/weights", json=asked),
                await client.post("/plan", json={**asked, "format": "onnx"}),
                await client.post("/plan", json={**asked, "budget": {"max_bytes": 9000}}),
                await client.get("/weights/tiny?dtype=int8"),
                await client.head("/weights/tiny?dtype=int8"),
            ):
                assert answer.status_code == 422
                if answer.request.method == "HEAD":
                    continue
                (entry,) = answer.json()["errors"]
                assert (entry["field"], entry["given"]) == ("dtype", "'int8'")
                assert entry["allowed"].startswith("'float32', 'float16' or 'bfloat16': ")
            assert (await client.get("/weights/tiny?dtype=float16")).status_code == 200

    asyncio.run(check())


def test_a_budget_of_bytes_is_of_the_format_asked_for(file: Path) -> None:
    async def check() -> None:
        async with served(file) as (client, _):
            for most in (40_000, 90_000):
                sizes = {}
                for form in ("safetensors", "onnx"):
                    asked = {"arch": "lenet", "format": form, "budget": {"max_bytes": most}}
                    sizes[form] = (await client.post("/plan", json=asked)).json()["bytes"]
                assert max(sizes.values()) <= most < 2 * min(sizes.values())

    asyncio.run(check())


def test_a_model_too_long_for_protobuf_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "LONGEST", 50_000)

    async def check() -> None:
        async with served(file) as (client, _):
            answer = await client.post("/plan", json={"arch": "lenet", "format": "onnx"})
            assert answer.status_code == 422 and "at most 50000 bytes" in answer.text
            assert (await client.post("/plan", json={"arch": "lenet"})).status_code == 200

    asyncio.run(check())
