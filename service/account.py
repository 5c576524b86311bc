"""One request's end: its metrics and its log line. Knows no route's meaning."""

from __future__ import annotations

import logging
import os
import re
import time
from functools import cache

from prometheus_client import Counter, Histogram
from starlette.types import Scope

from service import logs
from service.metrics import Metrics

PATH = 256
"""Characters of a path that are logged."""

lines = logging.getLogger("neumeta.request")


def request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own id, if it can stand in a log, or a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    valid = given and re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII)
    return given if valid else os.urandom(16).hex()


def client_of(scope: Scope) -> str:
    """The client's address. A unix socket has none: whoever may open it is a proxy of this machine,
    and the last entry of its X-Forwarded-For is what it saw."""
    if scope.get("client"):
        return str(scope["client"][0])
    told = dict(scope["headers"]).get(b"x-forwarded-for", b"").decode("latin-1")
    last = told.rpartition(",")[2].strip()
    return last if re.fullmatch(r"[\w.:\[\]-]{1,64}", last, re.ASCII) else "unix"


class Account:
    """Counts requests. A label's lookup takes a lock and a microsecond: once, not in every one."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.tier = cache(metrics.cache.labels)
        self.first_byte = cache(metrics.first_byte.labels)
        self._children = cache(self._labelled)

    def _labelled(self, route: str, status: int) -> tuple[Counter, Histogram, Counter]:
        metrics = self.metrics
        requests = metrics.requests.labels(route, str(status))
        return requests, metrics.latency.labels(route), metrics.sent.labels(route)

    def end(
        self,
        scope: Scope,
        route: str,
        found_id: str,
        status: int,
        size: int,
        began: float,
        tier: str,
        stalled: bool,
    ) -> None:
        """A request that began at `began` has ended, with `size` body bytes sent."""
        seconds = time.perf_counter() - began
        requests, latency, sent = self._children(route, status)
        requests.inc()
        latency.observe(seconds)
        sent.inc(size)
        if lines.isEnabledFor(logging.INFO):
            fields = {
                "request_id": found_id,
                "client": client_of(scope),
                "method": scope["method"],
                "route": route,
                "path": scope["path"][:PATH],
                "status": status,
                "bytes": size,
                "seconds": round(seconds, 6),
                "tier": tier,
            }
            if stalled:
                fields["stalled"] = True
            lines.info("request", extra={logs.FIELDS: fields})
