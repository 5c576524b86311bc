"""The manifold file: read, write, verify, describe. One safetensors file, never pickle.

Its metadata is one JSON string under the key `neumeta`, which carries a digest of every tensor and
of itself, so that damage is reported by name. Knows nothing of training or serving.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from neumeta import atomic
from neumeta.architecture import Space
from neumeta.family import FAMILIES
from neumeta.manifold import Manifold, representation
from neumeta.moments import keys

FORMAT = 1


class BadCheckpoint(ValueError):
    """The file is not a whole, undamaged manifold; the message names what is wrong."""


def _sha(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw).hexdigest()


def _seal(header: dict[str, Any]) -> str:
    body = {key: value for key, value in header.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _tensors(manifold: Manifold) -> dict[str, Tensor]:
    groups = {
        "inr": manifold.representation.state_dict(),
        "frozen": manifold.frozen,
        "statistics": manifold.statistics,
    }
    return {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _finite(name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise BadCheckpoint(f"{name}: tensor {key} holds a number that is not finite")


def _finite_numbers(name: str, value: Any, key: str = "") -> None:
    """The same for the header: its noise, its normalisation, its account of itself."""
    if isinstance(value, float) and not math.isfinite(value):
        raise BadCheckpoint(f"{name}: {key} is {value}, which is not finite")
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for part, each in value.items():
            _finite_numbers(name, each, f"{key}.{part}" if key else str(part))


def encode(manifold: Manifold, name: str = "manifold") -> bytes:
    """The file's bytes; equal manifolds give equal bytes.

    Raises BadCheckpoint, with `name` in it, if a number is not finite: it names the tensor or key.
    """
    tensors = _tensors(manifold)
    _finite(name, tensors)
    header: dict[str, Any] = {
        "format": FORMAT,
        "space": asdict(manifold.space),
        "representation": {"kind": manifold.kind, "options": manifold.options},
        "norm": manifold.norm,
        "noise": manifold.noise,
        "samples": manifold.samples,
        "scale": manifold.scale,
        "normalisation": manifold.normalisation,
        "labels": manifold.labels,
        "about": manifold.about,
        "tensors": {name: _sha(tensor) for name, tensor in tensors.items()},
    }
    _finite_numbers(name, header)
    header["seal"] = _seal(header)
    return save(tensors, {"neumeta": json.dumps(header, sort_keys=True)})


def write(manifold: Manifold, path: Path) -> str:
    """Write the checkpoint whole or not at all; returns its sha256, the manifold's identity.

    Raises BadCheckpoint if a number is not finite, atomic.BadTarget and OSError.
    """
    raw = encode(manifold, str(path))
    atomic.write(path, raw)
    return hashlib.sha256(raw).hexdigest()


def read(path: Path) -> Manifold:
    """The manifold in this file, every tensor verified.

    Raises BadCheckpoint, naming the tensor or the digest, if the file is cut short, damaged, of
    another format or of a family this version does not know, or holds a number that is not finite;
    FileNotFoundError if it is not there.
    """
    # Read once: the file may be replaced at any moment, and a memory map would follow it.
    raw = path.read_bytes()
    sha = hashlib.sha256(raw).hexdigest()
    try:
        tensors = load(raw)
        length = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    except SafetensorError as error:
        raise BadCheckpoint(f"{path}: damaged or cut short: {error}") from None
    if "neumeta" not in metadata:
        raise BadCheckpoint(f"{path}: no manifold (its metadata has no 'neumeta' key)")
    try:
        header = json.loads(metadata["neumeta"])
        sealed = header["seal"] == _seal(header)
    except (ValueError, KeyError, TypeError):
        sealed = False
    if not sealed:
        raise BadCheckpoint(f"{path}: the header's own digest does not match: it is damaged")
    if header["format"] != FORMAT:
        raise BadCheckpoint(f"{path}: format {header['format']}; this version reads {FORMAT}")
    _verify(path, header, tensors)
    _finite(str(path), tensors)
    _finite_numbers(str(path), header)
    manifold = _build(path, header, tensors)
    manifold.digest = sha
    return manifold


def _verify(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, digest in header["tensors"].items():
        if name not in tensors:
            raise BadCheckpoint(f"{path}: tensor {name} is missing")
        if _sha(tensors[name]) != digest:
            raise BadCheckpoint(f"{path}: tensor {name} does not match its digest: it is damaged")
    extra = sorted(set(tensors) - set(header["tensors"]))
    if extra:
        raise BadCheckpoint(f"{path}: tensor {extra[0]} is not named in the header")


def _build(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Manifold:
    given = header["space"]
    if given["family"] not in FAMILIES:
        raise BadCheckpoint(
            f"{path}: family {given['family']!r} is unknown; this version has {sorted(FAMILIES)}"
        )
    blocks = tuple(given["blocks"]) if given["blocks"] else None
    # Files of version 0.1 do not say it: then cost is counted at the family's own size.
    image = tuple(given["image"]) if given.get("image") else None
    space = Space(
        given["family"],
        given["arch"],
        given["classes"],
        tuple(given["morph"]),
        tuple(given["width"]),
        blocks,
        image,
    )
    if space.arch not in space.table.architectures:
        raise BadCheckpoint(f"{path}: {space.arch!r} is no architecture of {space.family}")

    def group(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {
            name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)
        }

    kind, options = header["representation"]["kind"], header["representation"]["options"]
    try:
        made = representation(kind, space, options, norm=header["norm"])
        made.load_state_dict(group("inr"))
    except (ValueError, RuntimeError) as error:
        raise BadCheckpoint(f"{path}: does not fit {space.family}: {error}") from None
    frozen, statistics = group("frozen"), group("statistics")
    for layer in space.table.layers(space.depth):
        if not space.morphing(layer):
            for name in (f"{layer.name}.weight", f"{layer.name}.bias"):
                if name not in frozen:
                    raise BadCheckpoint(f"{path}: tensor frozen.{name} is missing")
        elif header["norm"] and layer.norm:
            for name in keys(space, layer):
                if name not in statistics:
                    raise BadCheckpoint(f"{path}: tensor statistics.{name} is missing")
    return Manifold(
        space,
        made.eval().requires_grad_(False),
        kind,
        options,
        header["norm"],
        header["noise"],
        header["samples"],
        header["scale"],
        header["normalisation"],
        header["labels"],
        frozen,
        statistics,
        header["about"],
    )
