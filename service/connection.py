"""One client's connection: what uvicorn's own lacks, so that no client holds memory for ever.

Bounds a request's head, gives the application a way to cut, and cuts a client that leaves the end of
an answer unread. Knows no route; a send that waits before the end is `guard.py`'s to time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service import problem
from service.problem import Problem

ABORT = "neumeta.abort"
"""The scope's extension that cuts the connection: closing alone would wait for the reader."""
MAX_HEAD = 64 << 10


def too_long() -> Problem:
    """The refusal of a request whose line and headers are too long."""
    allowed = f"at most {MAX_HEAD} bytes"
    entry = problem.field("headers", f"more than {MAX_HEAD} bytes", allowed)
    return Problem(431, f"headers: too large; {allowed}", [entry], {"connection": "close"})


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with these bounds."""

    _head: int | None = None
    """Bytes of an unfinished request head; None outside of one."""
    _deadline: asyncio.TimerHandle | None = None
    """Of the end of the last answer: one timer a connection, however many answers it carries."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head = 0
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["extensions"] = {ABORT: self.transport.abort}

    def on_headers_complete(self) -> None:
        """Its head is whole."""
        self._head = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Bytes came; a head that does not end is answered before it fills the memory."""
        super().data_received(data)
        if self._head is None or self.transport.is_closing():
            return
        self._head += len(data)
        if self._head > MAX_HEAD:
            self.config.app.state.metrics.rejected.labels("size").inc()  # type: ignore[union-attr]
            body = problem.body(too_long())
            head = f"content-type: {problem.MEDIA}\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n"
                + head.encode()
                + b"\r\n"
                + body
            )
            self.transport.close()

    def on_response_complete(self) -> None:
        """The application is done; what is still unread has one more deadline."""
        answered = self.cycle
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:
            timeout = self.config.app.state.settings.send_timeout  # type: ignore[union-attr]
            if self._deadline:
                self._deadline.cancel()
            self._deadline = self.loop.call_later(timeout, self._cut_if_unread, answered)

    def _cut_if_unread(self, answered: object) -> None:
        # A connection that answers another request by now has sent this answer's end.
        transport: Any = self.transport
        if self.cycle is answered and transport.get_write_buffer_size() > 0:
            self.config.app.state.metrics.stalled.inc()  # type: ignore[union-attr]
            transport.abort()


def abort_of(scope: Any) -> Any:
    """What cuts this request's connection. Where the server offers nothing, breaking off does."""

    def broken() -> None:
        raise ConnectionAbortedError("the client stopped reading")

    return (scope.get("extensions") or {}).get(ABORT, broken)


async def settle() -> None:
    """Let the event loop tell an aborted connection's readers and writers that it is gone."""
    for _ in range(3):
        await asyncio.sleep(0)
