"""A server that sends one body slowly, by honest ranges: what a client does that is stopped midway."""

from __future__ import annotations

import base64
import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = 50


@contextmanager
def slow(body: bytes, seconds: float = 1.0) -> Iterator[tuple[str, list[int]]]:
    """The address of a server whose every answer is `body`, or the rest of it that a range asks for,
    over `seconds` for the whole; and where each answer began, in bytes. It has no plans, as a mirror
    that holds files alone."""
    began: list[int] = []
    promised = f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"
    step = len(body) // STEPS + 1

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.startswith("/plan/"):
                self.send_error(404)
                return
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            began.append(first)
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(body) - first))
            self.send_header("ETag", '"tag"')
            self.send_header("Repr-Digest", promised)
            self.end_headers()
            for offset in range(first, len(body), step):
                try:
                    self.wfile.write(body[offset : offset + step])
                except OSError:
                    return
                time.sleep(seconds / STEPS)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", began
    finally:
        server.shutdown()
        server.server_close()
