"""The pure ASGI shell around the application: the path's prefix, bounds, tokens, request id, metrics,
one log line a request, no stack traces. Whatever is answered, was let in here.

Knows no route's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import account, logs, problem
from service.account import Account
from service.connection import MAX_HEAD, too_long, was_cut
from service.hot import Hot
from service.lifecycle import Lifecycle
from service.problem import Problem
from service.request import no_query
from service.settings import ROUTES, Settings

OPEN = ("/", "/livez", "/readyz")
"""Answered without a token."""
BARE = ("/livez", "/readyz", "/metrics", "/docs", "/openapi.json")
"""Paths whose routes read no query: a parameter has no meaning there."""
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

    def __init__(
        self, app: ASGIApp, settings: Settings, lifecycle: Lifecycle, account: Account, hot: Hot
    ) -> None:
        self.app, self.lifecycle, self.metrics = app, lifecycle, lifecycle.metrics
        self.account, self.hot = account, hot
        self.root_path, self.max_body_bytes = settings.root_path, settings.max_body_bytes
        self.open = (*OPEN, "/metrics") if settings.metrics_open else OPEN

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raises Problem for a head that is too long, has no valid token or a query of no meaning."""
        head = len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if head + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
            self.metrics.rejected.labels("size").inc()
            raise too_long()
        tokens = self.lifecycle.tokens
        # The whole path is compared: /livez/x is no probe.
        private = tokens is not None and scope["path"] not in self.open
        if tokens and private and not tokens.allow(headers.get(b"authorization", b"")):
            self.metrics.rejected.labels("token").inc()
            told = {"WWW-Authenticate": "Bearer"}
            raise Problem(401, "a valid bearer token is needed", headers=told)
        if scope["query_string"] and scope["path"] in BARE:
            no_query(QueryParams(scope["query_string"]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.root_path:
            scope = _below(scope, self.root_path)
        headers = dict(scope["headers"])
        request_id = account.request_id(headers)
        route, began = route_of(scope["path"]), time.perf_counter()
        logs.request_id.set(request_id)
        status, started, size, promised, tier = 500, False, 0, 0, ""

        async def observed(message: Message) -> None:
            nonlocal status, started, size, tier
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", request_id.encode()),
                ]
                tier = dict(message["headers"]).get(b"x-neumeta-cache", b"").decode()
                if self.lifecycle.draining:  # its next request goes to another replica
                    message["headers"].append((b"connection", b"close"))
            elif message["type"] == "http.response.body" and message.get("body"):
                if size == 0:
                    self.account.first_byte(route).observe(time.perf_counter() - began)
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
            self._admit(scope, headers)
            length = headers.get(b"content-length", b"0")
            promised = int(length[:20]) if length.isdigit() else 0
            if promised > self.max_body_bytes:
                raise TooLarge
            if not await self.hot.answer(scope, observed):
                await self.app(scope, bounded, observed)
        except Problem as error:
            if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
                error.headers["connection"] = "close"  # its body stays unread
                await _drain(receive)
            await problem.response(error)(scope, receive, observed)
        except TooLarge:
            if started:
                raise
            self.metrics.rejected.labels("size").inc()
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
            cut = was_cut(scope)
            self.account.end(scope, route, request_id, status, size, began, tier, cut)


def _below(scope: Scope, root_path: str) -> Scope:
    """The scope with this prefix named, and taken off its path: a proxy may have done that, or not."""
    scope = {**scope, "root_path": root_path}
    path, raw = scope["path"], scope.get("raw_path") or b""
    if path != root_path and not path.startswith(root_path + "/"):
        return scope
    prefix = root_path.encode()
    rest = raw[len(prefix) :] if raw.startswith(prefix) else raw
    return {**scope, "path": path[len(root_path) :] or "/", "raw_path": rest or b"/"}


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
