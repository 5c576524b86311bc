"""A manifold's file taken apart and sealed again, with whatever a test changes in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from neumeta import checkpoint


def stored(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, and the tensors as they lie in the file: some are deflated."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["neumeta"]), load(raw)


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a file in which nothing is deflated, and the tensors."""
    header, held = stored(path)
    tensors = checkpoint._inflated(path, header, held)
    return header | {"deflated": {}}, tensors


def seal(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write them with digests that are right; those of deflated tensors stay."""
    kept = {name: header["tensors"][name] for name in header.get("deflated", {})}
    digests = {name: checkpoint._sha(tensor) for name, tensor in tensors.items()}
    header = header | {"tensors": digests | kept}
    header["seal"] = checkpoint._seal(header)
    save_file(tensors, path, {"neumeta": json.dumps(header, sort_keys=True)})
