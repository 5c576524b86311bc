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

from neumeta import atomic, sites
from neumeta.bundle import bundled, parted
from neumeta.deflated import deflated, inflated, raw_bytes
from neumeta.graph import extent
from neumeta.manifold import Contract, Manifold, roles
from neumeta.notation import BadGraph, pack, unpack
from neumeta.representation import build
from neumeta.shapes import check
from neumeta.space import MOST_BLOCKS, Architecture, Space
from neumeta.statistics import Statistics, given

FORMAT = 3
"""Since 3 a tensor may be deflated; files of format 2, in which none is, are read too."""


class BadCheckpoint(ValueError):
    """The file is not a whole, undamaged manifold; the message names what is wrong."""


def _sha(tensor: Tensor) -> str:
    told = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(told + raw_bytes(tensor)).hexdigest()


def _seal(header: dict[str, Any]) -> str:
    body = {key: value for key, value in header.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _tensors(manifold: Manifold) -> dict[str, Tensor]:
    statistics: dict[str, Tensor] = dict(manifold.statistics.kept)
    images = {} if manifold.statistics.images is None else {"images": manifold.statistics.images}
    numbers = manifold.representation.state_dict()
    groups = {
        # Charts have many small tensors, and a header names each: it was a twelfth of the file.
        "inr": bundled(numbers) if manifold.kind == "charts" else numbers,
        "frozen": manifold.frozen,
        "kept": statistics,
        "calibration": images,
    }
    return {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _inflated(path: Path, header: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they were before `encode` deflated some."""
    tensors = dict(stored)
    for name, (dtype, shape) in header.get("deflated", {}).items():
        if name not in stored:
            continue  # `_verify` refuses that by name
        try:
            tensors[name] = inflated(stored[name], dtype, shape)
        except ValueError as error:
            raise BadCheckpoint(f"{path}: tensor {name}: {error}") from None
    return tensors


def _finite(name: str, tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
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


def encode(manifold: Manifold, where: str = "the manifold") -> bytes:
    """The file's bytes; equal manifolds give equal bytes. Raises BadCheckpoint for values that are
    not finite."""
    tensors = _tensors(manifold)
    _finite(where, tensors)
    packed = {name: deflated(tensor) for name, tensor in tensors.items()}
    smaller = {name: tensor for name, tensor in packed.items() if tensor is not None}
    space = manifold.space
    header: dict[str, Any] = {
        "format": FORMAT,
        "name": space.name,
        "graph": pack(space.graph),
        "width": list(space.width),
        "blocks": list(space.blocks) if space.blocks else None,
        "most": space.most,
        "named": {name: list(depth) for name, depth in space.named.items()},
        "representation": {"kind": manifold.kind, "options": manifold.options},
        "noise": manifold.noise,
        "samples": manifold.samples,
        "scale": manifold.scale,
        "contract": asdict(manifold.contract),
        "about": manifold.about,
        "tensors": {name: _sha(tensor) for name, tensor in tensors.items()},
        "deflated": {
            n: [str(tensors[n].dtype).removeprefix("torch."), list(tensors[n].shape)]
            for n in smaller
        },
    }
    _finite_numbers(where, header)
    header["seal"] = _seal(json.loads(json.dumps(header)))
    told = json.dumps(header, sort_keys=True, separators=(",", ":"))
    return save(tensors | smaller, {"neumeta": told})


def write(manifold: Manifold, path: Path) -> str:
    """Write the checkpoint whole or not at all; returns its sha256, the manifold's identity.

    Raises BadCheckpoint if a number is not finite, atomic.BadTarget and OSError.
    """
    raw = encode(manifold, str(path))
    atomic.write(path, raw)
    return hashlib.sha256(raw).hexdigest()


def is_manifold(path: Path) -> bool:
    """Whether this is a safetensors file that says it is a manifold; whether it is a whole one, `read`
    says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > 64 << 20:
                return False
            return "neumeta" in json.loads(file.read(length)).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def read(path: Path) -> Manifold:
    """The manifold in this file, every tensor verified.

    Raises BadCheckpoint, naming the tensor, the digest or the node, if the file is cut short, damaged,
    tampered with or of another format; FileNotFoundError if it is not there.
    """
    # Read once: the file may be replaced at any moment, and a memory map would follow it.
    raw = path.read_bytes()
    sha = hashlib.sha256(raw).hexdigest()
    try:
        stored = load(raw)
        length = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    except SafetensorError as error:
        raise BadCheckpoint(f"{path}: damaged or cut short: {error}") from None
    if "neumeta" not in metadata:
        raise BadCheckpoint(f"{path}: no manifold (its metadata has no 'neumeta' key)")
    try:
        header = json.loads(metadata["neumeta"])
        sealed = header["seal"] == _seal(header)
    except (ValueError, KeyError, TypeError, RecursionError):
        sealed = False
    if not sealed:
        raise BadCheckpoint(f"{path}: the header's own digest does not match: it is damaged")
    if header.get("format") not in (2, FORMAT):
        raise BadCheckpoint(
            f"{path}: format {header.get('format')}; this version reads 2 and {FORMAT}"
            " (benchmarks/convert.py converts files of version 0.1)"
        )
    try:
        tensors = _inflated(path, header, stored)
        _verify(path, header, tensors)
        manifold = _build(path, header, tensors)
    except BadCheckpoint:
        raise
    except BadGraph as error:
        raise BadCheckpoint(f"{path}: {error}") from None
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        raise BadCheckpoint(f"{path}: malformed: {type(error).__name__}: {error}") from None
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
    _finite(str(path), tensors)
    _finite_numbers(str(path), header)


def _space(path: Path, header: dict[str, Any]) -> Space:
    """The space of a header, each number bounded before anything of that size is made."""
    graph = unpack(header["graph"])
    check(graph, graph.full)
    check(graph.folded, graph.full)
    low, high = (float(each) for each in header["width"])
    if not 0 < low <= high <= 2:
        raise BadCheckpoint(f"{path}: width: {header['width']} is no range within 0 to 2")
    blocks = None
    if header["blocks"]:
        least, most = (int(each) for each in header["blocks"])
        if not 1 <= least <= most <= header["most"] <= MOST_BLOCKS:
            raise BadCheckpoint(
                f"{path}: blocks: {header['blocks']} is no range up to {MOST_BLOCKS}"
            )
        blocks = (least, most)
    named = {str(name): tuple(int(n) for n in depth) for name, depth in header["named"].items()}
    for name, depth in named.items():
        if len(depth) != len(graph.depth):
            raise BadCheckpoint(f"{path}: named: {name!r} has not {len(graph.depth)} stages")
    if blocks:
        # Repeated blocks must follow each other: one more of each, where there is room.
        more = graph.at(tuple(stage.children + 1 for stage in graph.stages))
        check(more, more.full)
    return Space(str(header["name"]), graph, (low, high), blocks, int(header["most"]), named)


def _build(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Manifold:
    space = _space(path, header)

    def group(prefix: str) -> dict[str, Tensor]:
        start = prefix + "."
        return {
            name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)
        }

    kind, options = header["representation"]["kind"], header["representation"]["options"]
    try:
        made = build(kind, options, roles(space))
        held = group("inr")
        # Before they were bundled, charts had every tensor by its own name.
        bundles = kind == "charts" and not any(name.count(".") > 2 for name in held)
        made.load_state_dict(parted(held, made.state_dict()) if bundles else held)
    except (ValueError, RuntimeError) as error:
        raise BadCheckpoint(f"{path}: does not fit {space.name}: {error}") from None
    frozen, kept, images = group("frozen"), group("kept"), group("calibration").get("images")
    _frozen(path, space, frozen)
    if images is None and any(node.op == "batch_norm" for node in space.graph.nodes):
        raise BadCheckpoint(f"{path}: tensor calibration.images is missing: there is batch norm")
    _measured(path, space, kept, images)
    about = header["contract"]
    channels = extent(space.graph.input[1], {})
    if not len(about["mean"]) == len(about["std"]) == channels or min(about["std"]) <= 0:
        raise BadCheckpoint(f"{path}: contract: mean and std are not those of {channels} channels")
    if not 0 <= float(header["noise"]) <= 0.5 or min(header["samples"], header["scale"]) < 1:
        raise BadCheckpoint(f"{path}: noise, samples or scale: out of range")
    contract = Contract(
        tuple(float(each) for each in about["mean"]),
        tuple(float(each) for each in about["std"]),
        tuple(str(each) for each in about["classes"]),
        str(about["task"]),
        str(about["metric"]),
        bool(about["higher"]),
    )
    return Manifold(
        space,
        made.eval().requires_grad_(False),
        kind,
        options,
        float(header["noise"]),
        int(header["samples"]),
        int(header["scale"]),
        contract,
        frozen,
        Statistics(images, kept),
        header["about"],
    )


def _frozen(path: Path, space: Space, frozen: dict[str, Tensor]) -> None:
    """Raises BadCheckpoint unless these are the tensors that do not morph."""
    graph = space.graph
    statistics = {name for node in graph.nodes for name in sites.statistics_names(node)}
    # Files written before these were kept have none: they are measured then, as the others are.
    unheld = set() if statistics & set(frozen) else statistics
    for name in sites.kept(graph):
        if name in unheld:
            continue
        if name not in frozen:
            raise BadCheckpoint(f"{path}: tensor frozen.{name} is missing")
        if tuple(frozen[name].shape) != graph.shape(name, graph.full):
            raise BadCheckpoint(
                f"{path}: tensor frozen.{name} has another shape than its graph says"
            )
    for name in sorted(statistics & set(frozen)):
        if name in sites.measured(graph):
            raise BadCheckpoint(f"{path}: tensor frozen.{name} differs by size: it is measured")
        if frozen[name].dtype != torch.float32:
            raise BadCheckpoint(f"{path}: tensor frozen.{name} is not of float32")
    for _, variance in given(graph, frozen).values():
        if bool((variance < 0).any()):
            raise BadCheckpoint(f"{path}: a variance among the frozen tensors is negative")


def _measured(path: Path, space: Space, kept: dict[str, Tensor], images: Tensor | None) -> None:
    """Refuse calibration images and statistics that could not be used when they are asked for."""
    if images is not None:
        wanted = tuple(extent(dim, {}) for dim in space.graph.input[1:])
        kinds = (torch.uint8, torch.float16, torch.float32)
        if tuple(images.shape[1:]) != wanted or len(images) < 2 or images.dtype not in kinds:
            raise BadCheckpoint(
                f"{path}: tensor calibration.images is {tuple(images.shape)}, not two or more of"
                f" {wanted}"
            )
    for key, statistics in kept.items():
        depth, channels = (tuple(int(n) for n in part.split(".") if n) for part in key.split("/"))
        architecture = Architecture(depth, channels)
        graph = space.graph_of(architecture)
        sizes = space.sizes(architecture)
        norms = (node for node in graph.nodes if node.op == "batch_norm")
        count = sum(graph.shape(node.tensors["mean"], sizes)[0] for node in norms)
        if tuple(statistics.shape) != (2, count):
            raise BadCheckpoint(
                f"{path}: tensor kept.{key} is {tuple(statistics.shape)}, not {(2, count)}"
            )
