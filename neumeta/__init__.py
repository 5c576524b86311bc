"""NeuMeta's shared core: what training and serving must agree on, and nothing of either."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`neumeta.pull(url, arch, out)` needs no other import; what does not pull does not load httpx."""
    if name == "pull":
        return import_module("neumeta.pull")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
