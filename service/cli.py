"""`neumeta-serve`: settings from flags and environment, then uvicorn. Knows no request."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import uvicorn
from pydantic import ValidationError

from service.app import create_app
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
        print(f"neumeta-serve: {name}: {first['input']!r}: {first['msg']}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"neumeta-serve: {error}", file=sys.stderr)
        return 2
    engine = app.state.engine
    name = sorted(engine.manifolds)[-1]
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host  # noqa: S104
    space = engine.manifolds[name].space
    width = max(space.width[0], min(0.5, space.width[1]))
    print(f"serving {', '.join(sorted(engine.manifolds))} on {engine.device}; try\n")
    print(
        f"  curl -sS http://{host}:{settings.port}/weights -H 'content-type: application/json'"
        f' -d \'{{"arch":"{name}","width":{width:g}}}\' -o net.safetensors\n',
        flush=True,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        timeout_graceful_shutdown=10,
    )
    uvicorn.Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(serve())
