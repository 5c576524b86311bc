"""The HTTP interface: routes and headers. Knows no torch; `engine.py` and `cache.py` do the work."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from neumeta import __version__
from service import page, problem
from service.account import Account
from service.cache import Body, Busy, Cache
from service.engine import Engine, Job
from service.guard import Guard
from service.hot import TAKEN, Hot, Target
from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.problem import Problem, refuse
from service.redis_cache import RedisCache
from service.request import (
    ALLOWED,
    WeightsRequest,
    addressed,
    from_json,
    from_query,
    no_query,
)
from service.settings import Settings
from service.tokens import Tokens

MEDIA = {"safetensors": "application/vnd.safetensors", "onnx": "application/octet-stream"}
"""By format. Nobody has registered a type for ONNX."""
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": problem.TITLES[status], "content": {problem.MEDIA: {}}}
    for status in (400, 401, 404, 413, 415, 422, 429, 431)
}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references: "#/$defs" would point into the OpenAPI document, to nothing."""
    if isinstance(node, list):
        return [_inlined(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(each, definitions) for key, each in node.items() if key != "$defs"}


_schema = WeightsRequest.model_json_schema()
BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _inlined(_schema, _schema["$defs"])}},
    }
}
QUERY = {
    "parameters": [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": allowed}
        for name, allowed in ALLOWED.items()
        if name not in ("arch", "budget")
    ]
}
ADDRESSED = {
    "parameters": [
        *QUERY["parameters"],
        {
            "name": "etag",
            "in": "query",
            "schema": {"type": "string"},
            "description": "the ETag without its quotes: these bytes for ever, or 404",
        },
    ]
}
FILES: dict[str, Any] = {media: {} for media in MEDIA.values()}
FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "the network, in the format asked for", "content": FILES},
    206: {"description": "the range asked for", "content": FILES},
    304: {"description": "the file the client has is current"},
    416: {"description": problem.TITLES[416], "content": {problem.MEDIA: {}}},
    **PROBLEMS,
}


UNVOUCHED = {"Cache-Control": "no-store", "X-Accel-Expires": "0"}
"""Headers of bytes whose digest is not known yet: a cache that kept them could never vouch for them.
nginx may have been told to ignore the first (`proxy_ignore_headers`); the second is its own."""
FOREVER = "max-age=31536000, immutable"
BRIEFLY = "max-age=10"
"""Where a file is may be told again for so long: a fleet that starts together asks once."""


class BodyResponse(StreamingResponse):
    """Bytes [start, stop) of a body, which is told when its reader is gone, however it went.

    With `vouched` they are not sent before their digest can be.
    """

    def __init__(
        self,
        body: Body,
        start: int,
        stop: int,
        status: int,
        headers: dict[str, str],
        media: str,
        vouched: bool = False,
    ) -> None:
        super().__init__(body.read(start, stop), status, headers, media)
        self.file, self.vouched = body, vouched

    async def stream_response(self, send: Send) -> None:
        if self.vouched:
            await self.file.whole()  # here, where a client that leaves is seen to
            self.headers["Repr-Digest"] = str(self.file.repr_digest)
        await super().stream_response(send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.file.leave()


async def warm() -> None:
    """Answer nobody with an empty file: what the libraries below load for their first answer takes as
    long as sampling a network, and no client waits for it."""
    body = Body(b"", 0)
    body.readers += 1

    async def gone(message: Message) -> None:
        pass

    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}  # as uvicorn says it
    never = asyncio.get_running_loop().create_future
    await BodyResponse(body, 0, 0, 200, {}, MEDIA["onnx"])(scope, never, gone)


def create_app(settings: Settings) -> FastAPI:
    """The application on these settings.

    Raises BadCheckpoint, ValueError or FileNotFoundError if a manifold cannot be served.
    """
    tokens = Tokens(Path(settings.tokens_file)) if settings.tokens_file else None
    engine = Engine.of(settings)
    metrics = Metrics()
    redis = None
    if settings.redis_url:
        redis = RedisCache(
            settings.redis_url,
            timeout=settings.redis_timeout,
            lease=settings.redis_lease,
            pause=settings.redis_pause,
            metrics=metrics,
        )
    cache = Cache(
        settings.cache_bytes,
        samplers=settings.samplers,
        max_flights=settings.max_flights,
        prepare=engine.prepare_thread,
        shared=redis,
        metrics=metrics,
    )
    account = Account(metrics)
    hot = Hot(cache, account)
    lifecycle = Lifecycle(settings, engine, metrics, tokens, reloaded=hot.clear)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await warm()
        if redis:
            await redis.ping()  # the first request finds a connection, or the failure counted
        yield
        await cache.close()
        if redis:
            await redis.close()

    app = FastAPI(
        title="NeuMeta Serve",
        description="Weights of any width and depth, sampled from one manifold.",
        version=__version__,
        lifespan=lifespan,
    )
    app.state.engine, app.state.metrics, app.state.cache = engine, metrics, cache
    app.state.settings, app.state.lifecycle, app.state.hot = settings, lifecycle, hot

    @app.exception_handler(Problem)
    async def refused(request: Request, error: Problem) -> Response:
        return problem.response(error)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # Starlette names the first matching route's methods only.
            headers["Allow"] = ", ".join(_methods(app, request))
        entry = problem.field("path", f"{request.method} {request.url.path}", "see GET /docs")
        detail = f"{entry['given'][1:-1]}: {str(error.detail).lower()}"
        return problem.response(Problem(error.status_code, detail, [entry], headers))

    # Who may have a file that needs a token is decided here, every time.
    shared = "private" if tokens else "public"

    async def weights(request: Request, job: Job, address: bool = False) -> Response:
        head, length, generation = job.plan.header, job.plan.length, hot.generation
        media = MEDIA[job.format]
        headers = {
            "ETag": job.etag,
            "Accept-Ranges": "bytes",
            "Content-Location": settings.root_path + job.address,
            # Without its ETag a URL has other bytes once another manifold is loaded: keep, but ask.
            "Cache-Control": f"{shared}, {FOREVER}" if address else "public, no-cache",
            "X-Neumeta-Architecture": job.architecture.key,
        }
        if job.architecture.extrapolated:
            headers["X-Neumeta-Extrapolated"] = "true"
        # Every answer about the file says its digest, once that is known: a cache that asks whether
        # what it keeps is current learns of it too.
        known = {"Repr-Digest": cache.digests[job.key]} if job.key in cache.digests else {}
        safe = request.method in ("GET", "HEAD")
        if safe and _matches(request.headers.get("if-none-match"), job.etag):
            return Response(status_code=304, headers=headers | known)
        if request.method == "HEAD":
            headers["Content-Length"] = str(length)
            kept = UNVOUCHED if address and not known else known
            return Response(headers=headers | kept, media_type=media)
        status, start, stop = 200, 0, length
        # A range is of GET alone (RFC 9110, 14.2), and If-Range compares strongly.
        ranged = safe and request.headers.get("if-range", job.etag) == job.etag
        if ranged and (asked := _range(request.headers.get("range", ""), length)):
            status, (start, stop) = 206, asked
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{length}"
        headers["Content-Length"] = str(stop - start)
        if stop <= len(head) and job.key not in cache.finished:
            # The header alone: who reads shapes by range makes nobody sample.
            metrics.cache.labels("plan").inc()
            headers["X-Neumeta-Cache"] = "plan"
            return Response(head[start:stop], status, headers | (known or UNVOUCHED), media)

        def produce() -> Iterator[bytes]:
            return engine.weights(job)

        try:
            if TAKEN in request.scope:
                body, tier = request.scope[TAKEN]
            else:
                body, tier = await cache.get(job.key, head, length, produce)
        except Busy as error:
            metrics.rejected.labels("busy").inc()
            raise Problem(429, f"busy: {error}", headers={"Retry-After": "1"}) from None
        metrics.cache.labels(tier).inc()
        if request.method == "GET" and status == 200:
            raw = Response(headers=headers, media_type=media).raw_headers
            hot.keep(request.scope, Target(job.key, head, length, produce, raw), generation)
        headers["X-Neumeta-Cache"] = tier
        if body.repr_digest:
            known = {"Repr-Digest": body.repr_digest}
        if not address:
            headers |= known or UNVOUCHED
        return BodyResponse(body, start, stop, status, headers, media, address)

    @app.post("/weights", responses=FILE, openapi_extra=BODY, response_class=Response)
    async def post_weights(request: Request) -> Response:
        """The network of the requested size, streamed as safetensors or ONNX."""
        return await weights(request, engine.job(from_json(await _json(request))))

    @app.get("/weights/{arch}", responses=FILE, openapi_extra=ADDRESSED, response_class=Response)
    @app.head("/weights/{arch}", include_in_schema=False)
    async def get_weights(request: Request, arch: str) -> Response:
        """The same bytes by URL, resumable. HEAD samples nothing. With an `etag`, these or none."""
        query, etag = addressed(request.query_params)
        job = engine.job(from_query(arch, query))
        if etag not in (None, job.key):
            # No redirect: caches that follow one for their clients would keep its target's bytes
            # under this URL for ever.
            address = settings.root_path + job.address
            entry = problem.field("etag", etag, f"that of the file as it is now, {job.key}")
            detail = f"etag: {entry['given']} is not that of this file as it is now"
            raise Problem(404, detail, [entry], more={"address": address})
        return await weights(request, job, address=etag is not None)

    def planned(job: Job) -> dict[str, Any]:
        told = engine.describe(job)
        for name in ("location", "address"):
            told[name] = settings.root_path + told[name]
        return {**told, "repr_digest": cache.digests.get(job.key)}

    @app.post("/plan", responses=PROBLEMS, openapi_extra=BODY)
    async def plan(request: Request) -> JSONResponse:
        """Size, cost and expected score of a request; nothing is materialized."""
        return JSONResponse(planned(engine.job(from_json(await _json(request)))))

    @app.get("/plan/{arch}", responses={**PROBLEMS, 304: FILE[304]}, openapi_extra=QUERY)
    @app.head("/plan/{arch}", include_in_schema=False)
    async def get_plan(request: Request, arch: str) -> Response:
        """The same by URL, which a cache may repeat for some seconds: a fleet asks it where to go."""
        job = engine.job(from_query(arch, request.query_params))
        # Weak: what else it tells may change while the file does not.
        headers = {"ETag": f"W/{job.etag}", "Cache-Control": f"{shared}, {BRIEFLY}"}
        if _matches(request.headers.get("if-none-match"), job.etag):
            return Response(status_code=304, headers=headers)
        return JSONResponse(planned(job), headers=headers)

    @app.get("/models", responses=PROBLEMS)
    @app.head("/models", include_in_schema=False)
    async def models(request: Request) -> JSONResponse:
        """What is served."""
        no_query(request.query_params)
        return JSONResponse({"models": [engine.model(name) for name in sorted(engine.manifolds)]})

    @app.get("/models/{arch}", responses=PROBLEMS)
    @app.head("/models/{arch}", include_in_schema=False)
    async def model(request: Request, arch: str) -> JSONResponse:
        """One served architecture: ranges, parameters, MACs, score by size."""
        no_query(request.query_params)
        headers = {"Cache-Control": f"{shared}, {BRIEFLY}"}
        return JSONResponse(engine.model(arch), headers=headers)

    @app.get("/", include_in_schema=False)
    @app.head("/", include_in_schema=False)
    async def front() -> Response:
        """A page to look at."""
        return page.response()

    @app.get("/livez", responses=PROBLEMS)
    @app.head("/livez", include_in_schema=False)
    async def livez() -> JSONResponse:
        """The process answers."""
        return JSONResponse({"status": "live"})

    @app.get("/readyz", responses={**PROBLEMS, 503: PROBLEMS[429]})
    @app.head("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        """The manifolds are loaded and requests are welcome; 'degraded' while Redis is away."""
        if lifecycle.draining:
            raise Problem(503, "draining: this process is about to stop")
        status = "ready" if redis is None or await redis.ping() else "degraded"
        return JSONResponse({"status": status, "models": sorted(engine.manifolds)})

    @app.get("/metrics", responses=PROBLEMS, response_class=Response)
    @app.head("/metrics", include_in_schema=False)
    async def scrape() -> Response:
        """Prometheus metrics."""
        metrics.cache_bytes.set(cache.bytes)
        metrics.flights.set(cache.making)
        metrics.device_bytes.set(engine.device_bytes)
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_middleware(Guard, settings=settings, lifecycle=lifecycle, account=account, hot=hot)
    return app


def _methods(app: FastAPI, request: Request) -> list[str]:
    """Every method that some route answers on this path."""
    found: set[str] = set()
    for route in app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    return sorted(found)


async def _json(request: Request) -> bytes:
    """The body of a JSON request. Raises Problem 415 for another declared type."""
    no_query(request.query_params)
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    # curl -d declares a form unless told otherwise; the body decides, as long as it is JSON.
    if kind not in ("application/json", "application/x-www-form-urlencoded", ""):
        raise refuse("content-type", kind, "application/json", 415)
    return await request.body()


def _matches(header: str | None, etag: str) -> bool:
    """If-None-Match compares weakly (RFC 9110, 13.1.2)."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


def _range(header: str, length: int) -> tuple[int, int] | None:
    """(start, stop) of a Range field; None, the whole file, for none, several or another unit.

    Raises Problem 416 if a single byte range lies outside the file.
    """
    found = re.fullmatch(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})", header.strip(), re.ASCII | re.I)
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first and last and int(last) < int(first):
        return None
    if first:
        start, stop = int(first), min(int(last) + 1, length) if last else length
    else:
        start, stop = max(0, length - int(last)), length
    if start >= stop:
        entry = problem.field("range", header, f"bytes within 0-{length - 1}")
        detail = f"range: {entry['given']} is outside the file of {length} bytes"
        raise Problem(416, detail, [entry], {"Content-Range": f"bytes */{length}"})
    return start, stop
