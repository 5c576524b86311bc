"""Every setting of the service: its environment variable, its flag, its meaning. Knows no request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ROUTES = (
    "/",
    "/weights",
    "/models",
    "/plan",
    "/livez",
    "/readyz",
    "/metrics",
    "/docs",
    "/openapi.json",
)
_LINK = re.compile(r"(tcp|udp|sctp)://")
_LINKED = re.compile(r"NEUMETA_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT_\d+_(TCP|UDP|SCTP)\w*)")


def shipped() -> str:
    """The folder of the manifolds that come with this software: beside the code in a checkout, or
    where the installed package put it. Empty if there is none."""
    root = Path(__file__).parent.parent
    for beside in (root / "models", root / "share/neumeta/models"):  # the second: pip --target
        if any(beside.glob("*.safetensors")):
            return str(beside)
    try:
        files = metadata.files("neumeta-serve") or []
    except metadata.PackageNotFoundError:
        return ""
    found = (Path(str(f.locate())) for f in files if f.suffix == ".safetensors")
    return next((str(path.parent.resolve()) for path in found if path.is_file()), "")


def linked(environment: Mapping[str, str]) -> list[str]:
    """The variables that Kubernetes, for a Service whose name begins with `neumeta`, or Docker, for a
    linked container, put beside the settings: they are none, and are left out."""
    return sorted(
        name
        for name, value in environment.items()
        if _LINKED.fullmatch(name)
        or (re.fullmatch(r"NEUMETA_(\w+_)?PORT", name) and _LINK.match(value))
    )


class _Environment(EnvSettingsSource):
    """The environment without such variables."""

    def __call__(self) -> dict[str, Any]:
        found = super().__call__()
        if _LINK.match(str(found.get("port", ""))):
            del found["port"]
        return found


class Settings(BaseSettings):
    """Settings; `NEUMETA_<NAME>` in the environment, `--<name>` as a flag."""

    model_config = SettingsConfigDict(env_prefix="NEUMETA_", extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on (0: a free one)")
    uds: str = Field("", description="unix socket to listen on, instead of host and port")
    root_path: str = Field(
        "", description="path prefix under which a proxy shows the service, such as `/neumeta`"
    )
    models: str = Field(
        default_factory=shipped,
        description="manifold files or folders of them, separated by commas",
    )
    device: str = Field("auto", description="'auto' (CUDA where there is one), 'cpu' or 'cuda'")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of an MLP's matrix products: 'tf32' (CUDA) or 'bfloat16' where the device has it;"
        " bytes and ETag follow it",
    )
    cache_bytes: int = Field(256 << 20, ge=0, description="bound of the in-memory cache, in bytes")
    max_body_bytes: int = Field(16 << 10, ge=256, description="largest request body, in bytes")
    max_file_bytes: int = Field(
        64 << 20, ge=1 << 10, description="largest file that is materialized, in bytes"
    )
    max_samples: int = Field(64, ge=1, le=4096, description="largest K a request may ask for")
    samplers: int = Field(1, ge=1, le=64, description="materializations that run at once")
    max_flights: int = Field(
        64, ge=1, description="materializations that run or wait; beyond them the answer is 429"
    )
    threads: int = Field(
        1, ge=1, le=256, description="torch threads per materialization; bytes and ETag follow it"
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="least severe log line that is written"
    )
    redis_url: str = Field(
        "",
        description="Redis or Valkey that replicas share: redis, rediss, valkey, valkeys or unix"
        " URL, `redis+cluster://` for a cluster; empty: memory only",
    )
    redis_timeout: float = Field(
        0.15, gt=0, le=10, description="seconds a Redis command may take before it is given up"
    )
    redis_lease: float = Field(
        5.0, gt=0, le=600, description="seconds after which a replica that died is known to be dead"
    )
    redis_pause: float = Field(
        1.0, gt=0, le=600, description="seconds between pings of a Redis that is left alone"
    )

    send_timeout: float = Field(
        20.0, gt=0, description="seconds a client may leave sent bytes unread; then it is cut"
    )
    tokens_file: str = Field(
        "", description="file of bearer tokens, one a line; without it every request is let in"
    )
    metrics_open: bool = Field(
        True, description="whether /metrics is answered without a token (the probes always are)"
    )
    log_format: Literal["json", "text"] = Field("json", description="'json' or 'text' log lines")
    drain_seconds: float = Field(
        3.0, ge=0, description="seconds from SIGTERM, when /readyz turns 503, to the closed port"
    )
    grace_seconds: int = Field(
        20, ge=0, description="seconds the answers under way have after that to finish"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before the environment, of which what Kubernetes and Docker add is left out."""
        return init_settings, _Environment(settings_cls)

    @field_validator("root_path")
    @classmethod
    def _prefix(cls, given: str) -> str:
        if given and not re.fullmatch(r"(/[\w.~-]+)+", given, re.ASCII):
            raise ValueError("must be empty, or begin with / and not end with it")
        if given and "/" + given.split("/")[1] in ROUTES:
            raise ValueError(f"must not begin as a path of the service does: {', '.join(ROUTES)}")
        return given

    def files(self) -> list[Path]:
        """The manifold files these settings name. Raises FileNotFoundError naming what is absent."""
        if not self.models.strip(", "):
            told = "there are none in this installation; name files with --models or NEUMETA_MODELS"
            raise FileNotFoundError(f"models: {told}")
        found: list[Path] = []
        for name in filter(None, (part.strip() for part in self.models.split(","))):
            path = Path(name)
            if path.is_dir():
                found.extend(sorted(path.glob("*.safetensors")))
            elif path.is_file():
                found.append(path)
            else:
                raise FileNotFoundError(f"models: {path} is neither a file nor a folder")
        if not found:
            raise FileNotFoundError(f"models: no *.safetensors in {self.models}")
        return found


def table() -> str:
    """All settings as a markdown table: what the README shows, and a test compares."""
    rows = ["| environment | flag | default | meaning |", "|---|---|---|---|"]
    for name, entry in Settings.model_fields.items():
        default = "none" if entry.default == "" else f"`{entry.default}`"
        default = "the shipped `models/`" if name == "models" else default
        flag = name.replace("_", "-")
        rows.append(f"| `NEUMETA_{name.upper()}` | `--{flag}` | {default} | {entry.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
