"""`neumeta-serve`: settings from flags and environment, then uvicorn. Knows no request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError

from service import logs
from service.app import create_app
from service.connection import Connection
from service.engine import Engine
from service.settings import Settings

log = logging.getLogger("neumeta")


def settings_from(argv: list[str] | None = None) -> Settings:
    """Settings from flags, each with its environment twin. Raises ValidationError."""
    parser = argparse.ArgumentParser(prog="neumeta-serve", description=__doc__)
    for name, entry in Settings.model_fields.items():
        described = f"{entry.description} (NEUMETA_{name.upper()}, default {entry.default})"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, default=None, help=described.replace("%", "%%"))
    given = parser.parse_args(argv)
    flags: dict[str, Any] = {key: value for key, value in vars(given).items() if value is not None}
    return Settings(**flags)


def serve(argv: list[str] | None = None) -> int:
    """Start the service; exit code 2 and one line if it cannot start."""
    try:
        settings = settings_from(argv)
        app = create_app(settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        return _refuse(f"{name}: {first['input']!r}: {first['msg']}")
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        http=Connection,
        log_config=None,
        access_log=False,  # the guard writes one line a request
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    logs.configure(settings.log_level, settings.log_format)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the event loop can reload
    Server(config).run()
    return 0


class Server(uvicorn.Server):
    """uvicorn's, which says how to reach it once it can be reached, reloads on SIGHUP, and on
    SIGTERM goes on serving for a while: whoever sends the requests must first see /readyz fail."""

    _asked = False
    _closing: float | None = None

    @property
    def _state(self) -> Any:
        return self.config.app.state  # type: ignore[union-attr]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM drains; a second one, or Ctrl+C, closes the port at once."""
        # A handler interrupts anything, also who holds the lock of a metric or of the log: it
        # notes the signal, and the next tick acts on it.
        if sig == signal.SIGTERM and self.started:
            self.should_exit = self._asked
            self._asked = True
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop serving."""
        if self._asked and self._closing is None:
            self._state.lifecycle.drain()
            self._closing = time.monotonic() + self._state.settings.drain_seconds
            log.info("draining: not ready, still serving")
        if self._closing is not None and time.monotonic() >= self._closing:
            self.should_exit = True
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind and listen; exits the process with one logged line where that fails."""
        await super().startup(sockets)
        if self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._state.lifecycle.hang_up)
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            text = welcome(self._state.engine, host, port)
            with contextlib.suppress(OSError):  # who started it may have stopped reading
                sys.stdout.write(text)
                sys.stdout.flush()


def welcome(engine: Engine, host: str, port: int) -> str:
    """What is served, and a command that works when it is pasted."""
    name = sorted(engine.manifolds)[-1]
    space = engine.manifolds[name].space
    body: dict[str, Any] = {"arch": name}
    if space.stages:
        body["width"] = max(space.width[0], min(0.5, space.width[1]))
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return (
        f"serving {', '.join(sorted(engine.manifolds))} on {engine.device}; try\n\n"
        f"  curl -sS http://{shown}:{port}/weights -H 'content-type: application/json'"
        f" -d '{json.dumps(body, separators=(',', ':'))}' -o net.safetensors\n\n"
    )


def _refuse(why: str) -> int:
    print(f"neumeta-serve: {why}".replace("\n", " "), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(serve())
