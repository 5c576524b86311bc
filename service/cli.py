"""`neumeta-serve`: settings from flags and environment, then uvicorn. Knows no request."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from pydantic import ValidationError

from neumeta.space import Space
from service import logs
from service.app import create_app
from service.connection import Connection
from service.engine import Engine
from service.settings import Settings, linked

LONGEST_SOCKET = 107
"""Bytes of a unix socket's path, on Linux."""

log = logging.getLogger("neumeta")


def settings_from(argv: list[str] | None = None) -> Settings:
    """Settings from flags, each with its environment twin. Raises ValidationError."""
    parser = argparse.ArgumentParser(prog="neumeta-serve", description=__doc__)
    for name, entry in Settings.model_fields.items():
        default = entry.get_default(call_default_factory=True)
        described = f"{entry.description} (NEUMETA_{name.upper()}, default {default})"
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, dest=name, default=None, help=described.replace("%", "%%"))
    given = parser.parse_args(argv)
    flags: dict[str, Any] = {key: value for key, value in vars(given).items() if value is not None}
    return Settings(**flags)


def serve(argv: list[str] | None = None) -> int:
    """Start the service; exit code 2 and one line if it cannot start."""
    try:
        settings = settings_from(argv)
        if settings.uds:
            clear(Path(settings.uds))
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
        uds=settings.uds or None,
        log_level=settings.log_level,
        http=Connection,
        log_config=None,
        access_log=False,  # the guard writes one line a request
        timeout_graceful_shutdown=settings.grace_seconds,
    )
    logs.configure(settings.log_level, settings.log_format)
    if names := linked(os.environ):
        log.warning(
            "environment: %s left out: Kubernetes or Docker set them for a service of this name",
            ", ".join(names),
        )
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the event loop can reload
    server = Server(config)
    # What is loaded by now stays for the process's life. A collection that looked through all of it
    # would hold up every request for 0.15 s, as long as Redis has to answer.
    gc.collect()
    gc.freeze()
    try:
        server.run()
    finally:
        server.forget_socket()
    return 0


class Server(uvicorn.Server):
    """uvicorn's, which says how to reach it once it can be reached, reloads on SIGHUP, and on
    SIGTERM goes on serving for a while: whoever sends the requests must first see /readyz fail."""

    _asked = False
    _closing: float | None = None
    _socket: os.stat_result | None = None

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
        try:
            await super().startup(sockets)
        except OSError as error:  # uvicorn answers a port's failure itself, a unix socket's not
            log.error("uds: %s: %s", self.config.uds, error.strerror or error)
            await self.lifespan.shutdown()
            sys.exit(3)  # as uvicorn does where a port cannot be had
        if self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._state.lifecycle.hang_up)
            if self.config.uds:
                self._socket = os.stat(self.config.uds)
                text = welcome(self._state.engine, f"--unix-socket {self.config.uds} ", "localhost")
            else:
                host, port, *_ = self.servers[0].sockets[0].getsockname()
                # What listens everywhere is shown where it is sure to be reached.
                shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
                shown = f"[{shown}]" if ":" in shown else shown
                text = welcome(self._state.engine, "", f"{shown}:{port}")
            with contextlib.suppress(OSError):  # who started it may have stopped reading
                sys.stdout.write(text)
                sys.stdout.flush()

    def forget_socket(self) -> None:
        """Remove the unix socket, unless another process has put its own there meanwhile."""
        if self._socket and self.config.uds:
            with contextlib.suppress(OSError):
                found = os.stat(self.config.uds)
                if (found.st_dev, found.st_ino) == (self._socket.st_dev, self._socket.st_ino):
                    os.unlink(self.config.uds)


def clear(path: Path) -> None:
    """Remove a socket on which nobody listens any more: its process was killed.

    Raises ValueError if somebody does, or if something else is there.
    """
    if not path.parent.is_dir():
        raise ValueError(f"uds: {path}: there is no folder {path.parent}")
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        raise ValueError(f"uds: {path}: longer than {LONGEST_SOCKET} bytes")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ValueError(f"uds: {path} is there and is no socket")
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(1)
        try:
            other.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise ValueError(f"uds: {path}: {error.strerror or error}") from None
    raise ValueError(f"uds: {path}: another process listens there")


def welcome(engine: Engine, flag: str, address: str) -> str:
    """What is served, and a command that works when it is pasted."""
    spaces = {name: found.space for name, found in engine.manifolds.items()}
    # What has the most sizes to choose from.
    name = max(spaces, key=lambda each: (_choices(spaces[each]), each))
    space = spaces[name]
    body: dict[str, Any] = {"arch": name}
    if space.extents:
        body["width"] = max(space.width[0], min(0.5, space.width[1]))
    return (
        f"serving {', '.join(sorted(engine.manifolds))} on {engine.device}; try\n\n"
        f"  curl -sS {flag}http://{address}/weights -H 'content-type: application/json'"
        f" -d '{json.dumps(body, separators=(',', ':'))}' -o net.safetensors\n\n"
    )


def _choices(space: Space) -> int:
    """How many widths and depths of its own a request can give."""
    return len(space.groups) + (len(space.graph.stages) if space.blocks else 0)


def _refuse(why: str) -> int:
    print(f"neumeta-serve: {why}".replace("\n", " "), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(serve())
