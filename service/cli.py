"""`neumeta-serve`: settings from flags and environment, then uvicorn. Knows no request."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
from typing import Any

import uvicorn
from pydantic import ValidationError

from service.app import create_app
from service.engine import Engine
from service.settings import Settings


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
        timeout_graceful_shutdown=10,
    )
    Server(config).run()
    return 0


class Server(uvicorn.Server):
    """uvicorn's, which says how to reach it once it can be reached."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind and listen; exits the process with one logged line where that fails."""
        await super().startup(sockets)
        if self.started:
            host, port, *_ = self.servers[0].sockets[0].getsockname()
            text = welcome(self.config.app.state.engine, host, port)  # type: ignore[union-attr]
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
