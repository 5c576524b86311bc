"""The pure ASGI shell around the application: body bound, request id, metrics, no stack traces.

Knows no route's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import problem
from service.metrics import Metrics
from service.problem import Problem

ROUTES = ("/weights", "/models", "/plan", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json")
DRAIN_BYTES, DRAIN_SECONDS = 8 << 20, 0.5
GONE = 499
"""nginx's number for a client that left before its answer; it is counted, never sent."""

log = logging.getLogger("neumeta")


class TooLarge(Exception):
    """The body passed its bound while it was being read."""


def route_of(path: str) -> str:
    """The route's name for a metric label: one of a closed set."""
    first = "/" + path.split("/", 2)[1] if path.startswith("/") else path
    return first if first in ROUTES else "other"


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self.app, self.metrics, self.max_body_bytes = app, metrics, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else uuid.uuid4().hex
        route, began = route_of(scope["path"]), time.perf_counter()
        status, started, size, promised = 500, False, 0, 0

        async def observed(message: Message) -> None:
            nonlocal status, started, size
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
            elif message["type"] == "http.response.body" and message.get("body"):
                if size == 0:
                    self.metrics.first_byte.labels(route).observe(time.perf_counter() - began)
                size += len(message["body"])
            await send(message)

        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise TooLarge
            return message

        self.metrics.in_flight.inc()
        try:
            length = headers.get(b"content-length", b"0")
            promised = int(length[:20]) if length.isdigit() else 0
            if promised > self.max_body_bytes:
                raise TooLarge
            await self.app(scope, bounded, observed)
        except TooLarge:
            if started:
                raise
            if b"expect" not in headers and promised <= DRAIN_BYTES:
                await _drain(receive)
            allowed = f"at most {self.max_body_bytes} bytes"
            refused = Problem(
                413,
                f"body: too large; {allowed}",
                [problem.field("body", f"more than {self.max_body_bytes} bytes", allowed)],
                {"connection": "close"},
            )
            await problem.response(refused)(scope, receive, observed)
        except ClientDisconnect:
            status = GONE
        except Exception:
            log.exception("request %s failed", request_id)
            if started:
                raise  # the connection breaks: the client sees fewer bytes than Content-Length
            await problem.response(Problem(500, "internal error"))(scope, receive, observed)
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.latency.labels(route).observe(time.perf_counter() - began)
            self.metrics.sent.labels(route).inc(size)


async def _drain(receive: Receive) -> None:
    """Read on for a moment and forget what comes: a client that is still sending when the
    connection closes would see a reset instead of its answer."""
    seen = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while seen < DRAIN_BYTES:
                message = await receive()
                seen += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
