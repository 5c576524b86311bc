"""One client's connection: what uvicorn's own lacks, so that no client holds memory for ever.

Bounds a request's head, and cuts a client that leaves what was sent unread for too long, whether a
send waits for it or an answer's end does. Knows no route.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service import problem
from service.problem import Problem

STALLED = "neumeta.stalled"
"""The scope's extension that is there once its reader was cut."""
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
    _paused: asyncio.TimerHandle | None = None
    """Of a send that waits because too much is unread."""
    _deadline: asyncio.TimerHandle | None = None
    """Of the end of the last answer: one timer a connection, however many answers it carries."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head = 0
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope["extensions"] = {}

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

    def pause_writing(self) -> None:
        """More is unread than may be: the next send waits, but not for ever."""
        super().pause_writing()
        self._paused = self._after(self._cut)

    def resume_writing(self) -> None:
        """The client read on."""
        super().resume_writing()
        if self._paused:
            self._paused.cancel()

    def on_response_complete(self) -> None:
        """The application is done; what is still unread has one more deadline."""
        answered = self.cycle
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:
            if self._deadline:
                self._deadline.cancel()
            self._deadline = self._after(self._cut_if_unread, answered)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody is left to be cut."""
        for timer in (self._paused, self._deadline):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def _after(self, act: Any, *given: object) -> asyncio.TimerHandle:
        timeout = self.config.app.state.settings.send_timeout  # type: ignore[union-attr]
        return self.loop.call_later(timeout, act, *given)

    def _cut_if_unread(self, answered: object) -> None:
        # A connection that answers another request by now has sent this answer's end.
        if self.cycle is answered and self.transport.get_write_buffer_size() > 0:
            self._cut()

    def _cut(self) -> None:
        # Closing alone would wait for the reader. What is sent after this the server drops.
        transport: Any = self.transport
        self.cycle.scope["extensions"][STALLED] = {}
        self.config.app.state.metrics.stalled.inc()  # type: ignore[union-attr]
        transport.abort()


def was_cut(scope: Any) -> bool:
    """Whether this request's reader was cut because it read nothing for too long."""
    return STALLED in (scope.get("extensions") or {})
