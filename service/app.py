"""The HTTP interface: routes and headers. Knows no torch; `engine.py` and `cache.py` do the work."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from service import problem
from service.cache import Body, Cache
from service.engine import Engine, Job
from service.guard import Guard
from service.metrics import Metrics
from service.problem import Problem, refuse
from service.request import WeightsRequest, from_json, from_query
from service.settings import Settings

MEDIA = "application/vnd.safetensors"
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": problem.TITLES[status], "content": {problem.MEDIA: {}}}
    for status in (400, 404, 413, 415, 422)
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": WeightsRequest.model_json_schema()}},
    }
}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the weights, as safetensors", "content": {MEDIA: {}}},
    **PROBLEMS,
}


def create_app(settings: Settings) -> FastAPI:
    """The application on these settings.

    Raises BadCheckpoint, ValueError or FileNotFoundError if a manifold cannot be served.
    """
    engine = Engine(
        settings.files(),
        device=settings.device,
        max_samples=settings.max_samples,
        max_file_bytes=settings.max_file_bytes,
    )
    metrics = Metrics()
    for name, manifold in engine.manifolds.items():
        info = {"sha256": manifold.digest, "family": manifold.space.family}
        metrics.checkpoint.labels(name).info(info)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.cache = Cache(settings.cache_bytes, settings.samplers)
        yield
        await app.state.cache.close()

    app = FastAPI(
        title="NeuMeta Serve",
        description="Weights of any width and depth, sampled from one manifold.",
        lifespan=lifespan,
    )
    app.state.engine, app.state.metrics = engine, metrics

    @app.exception_handler(Problem)
    async def refused(request: Request, error: Problem) -> Response:
        return problem.response(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        detail = f"{request.method} on this path: {error.detail}"
        return problem.response(Problem(error.status_code, detail, headers=headers))

    def produce(job: Job) -> Iterator[bytes]:
        began = time.perf_counter()
        try:
            yield from engine.chunks(job)
        except Exception:
            metrics.failures.inc()
            raise
        metrics.sampling.observe(time.perf_counter() - began)

    def weights(request: Request, job: Job) -> Response:
        cache: Cache = app.state.cache
        headers = {
            "ETag": f'"{job.key}"',
            "Accept-Ranges": "bytes",
            "Content-Location": job.location,
            # The same URL has other bytes once another manifold is loaded: keep, but ask first.
            "Cache-Control": "public, no-cache",
            "X-NeuMeta-Architecture": job.architecture.key,
        }
        if job.architecture.extrapolated:
            headers["X-NeuMeta-Extrapolated"] = "true"
        get = request.method in ("GET", "HEAD")
        if get and _matches(request.headers.get("if-none-match"), headers["ETag"]):
            return Response(status_code=304, headers=headers)
        start, stop, partial = 0, job.plan.length, False
        if get and "range" in request.headers:
            condition = request.headers.get("if-range")
            if condition is None or condition == headers["ETag"]:
                start, stop, partial = _range(request.headers["range"], job.plan.length)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{job.plan.length}"
        headers["Content-Length"] = str(stop - start)
        status = 206 if partial else 200
        if request.method == "HEAD":
            kept = cache.finished.get(job.key)
            if kept and kept.repr_digest:
                headers["Repr-Digest"] = kept.repr_digest
            return Response(status_code=status, headers=headers, media_type=MEDIA)
        body, tier = cache.get(job.key, job.plan.length, lambda: produce(job))
        metrics.cache.labels(tier).inc()
        headers["X-NeuMeta-Cache"] = tier
        if body.repr_digest:
            headers["Repr-Digest"] = body.repr_digest
        return StreamingResponse(_read(body, start, stop), status, headers, MEDIA)

    @app.post("/weights", responses=FILE, openapi_extra=BODY, response_class=Response)
    async def post_weights(request: Request) -> Response:
        """Weights of the requested architecture, streamed as safetensors."""
        return weights(request, engine.job(from_json(await _json(request))))

    @app.api_route(
        "/weights/{arch}", methods=["GET", "HEAD"], responses=FILE, response_class=Response
    )
    async def get_weights(request: Request, arch: str) -> Response:
        """The same bytes by URL: width, depth, dtype, samples, seed, extrapolate; resumable."""
        return weights(request, engine.job(from_query(arch, request.query_params)))

    @app.post("/plan", responses=PROBLEMS, openapi_extra=BODY)
    async def plan(request: Request) -> JSONResponse:
        """Size, cost and expected accuracy of a request; nothing is materialized."""
        return JSONResponse(engine.describe(engine.job(from_json(await _json(request)))))

    @app.get("/models")
    async def models() -> JSONResponse:
        """What is served."""
        return JSONResponse({"models": [engine.model(name) for name in sorted(engine.manifolds)]})

    @app.get("/models/{arch}", responses=PROBLEMS)
    async def model(arch: str) -> JSONResponse:
        """One served architecture: ranges, parameters, MACs, accuracy by size."""
        return JSONResponse(engine.model(arch))

    @app.get("/livez")
    async def livez() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """The manifolds are loaded and requests are welcome."""
        return JSONResponse({"status": "ready", "models": sorted(engine.manifolds)})

    @app.get("/metrics", response_class=Response)
    async def scrape() -> Response:
        """Prometheus metrics."""
        metrics.cache_bytes.set(app.state.cache.bytes)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(Guard, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    return app


async def _json(request: Request) -> bytes:
    """The body of a JSON request. Raises Problem 415 for another declared type."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    # curl -d declares a form unless told otherwise; the body decides, as long as it is JSON.
    if kind not in ("application/json", "application/x-www-form-urlencoded", ""):
        raise refuse("content-type", kind, "application/json", 415)
    return await request.body()


async def _read(body: Body, start: int, stop: int) -> AsyncIterator[bytes]:
    async for chunk in body.read(start, stop):
        yield chunk


def _matches(header: str | None, etag: str) -> bool:
    """If-None-Match compares weakly (RFC 9110, 13.1.2)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _range(header: str, length: int) -> tuple[int, int, bool]:
    """(start, stop, partial) of a Range field; several ranges or another unit mean the whole file.

    Raises Problem 416 if a single byte range lies outside the file.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if not found or found.groups() == ("", ""):
        return 0, length, False
    first, last = found.groups()
    if first == "":
        start, stop = max(0, length - int(last)), length
    else:
        start, stop = int(first), min(int(last) + 1, length) if last else length
        if last and int(last) < int(first):
            return 0, length, False
    if start >= stop:
        raise Problem(
            416,
            f"range: {header[:60]} is outside the file of {length} bytes",
            [problem.field("range", header, f"bytes within 0-{length - 1}")],
            {"Content-Range": f"bytes */{length}"},
        )
    return start, stop, True
