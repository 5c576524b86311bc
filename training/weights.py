"""Weights that others published: reading a file of them, and fitting them into a module.

A file is read whatever its layout: torch or safetensors, bare or nested, in any precision, with the
prefixes that wrappers leave. Nothing in it is ever run. Knows no family and no manifold.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
)
"""Keys under which files keep their weights, first choice first: averaged weights (EMA) come last."""

PREFIXES = ("module.", "model.", "net.", "network.")
"""What wrappers put before every name; torch.compile puts `_orig_mod.` anywhere."""

# Numbers of numpy's (an accuracy, say) and a namespace of arguments beside the weights are data like
# any other. numpy 2 moved the functions that make them, so that files name each in two ways.
_BESIDE: list[Any] = [
    Namespace,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
    *(
        (made, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for made, name in (
            (np.float64(0).__reduce__()[0], "scalar"),
            (np.zeros(0).__reduce__()[0], "_reconstruct"),
        )
    ),
]


def read(path: Path) -> dict[str, Tensor]:
    """The weights in this file by name, floating-point ones as float32; shapes as they are.

    Prefixes that wrappers leave are taken off; what is no tensor with a name, and an optimiser's
    state, is passed over. Of several sets the first of `WRAPPERS` is taken.

    Raises ValueError, naming the file and what is wrong, if there are no such weights in it;
    FileNotFoundError if it is not there.
    """
    if path.is_dir():
        raise ValueError(f"{path}: a folder, not a file of weights")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: no regular file")
    tensors = _tensors(_held(path))
    if not tensors:
        raise ValueError(f"{path}: no weights by name in it (a dict of tensors: a state dict)")
    found = {}
    for name, tensor in zip(plain(tensors), tensors.values(), strict=True):
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"{path}: {name} is quantised, sparse or empty: dense numbers are read"
            )
        tensor = tensor.detach()
        if tensor.is_floating_point():
            if _count(name):
                continue  # cast with the rest, and no longer a count: it may be infinite
            tensor = tensor.float().contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{path}: {name} has values that are not finite")
        found[name] = tensor
    return found


def _held(path: Path) -> object:
    """What the file holds: told by its first bytes, since names mislead."""
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path}: an empty file")
    if head[8:] == b"{":
        try:
            return load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path}: cut short or damaged: {error}") from None
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_BESIDE):
            warnings.simplefilter("ignore")  # what torch warns of here is refused below, by name
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of anything: torch has no closed set of errors for that
        raise ValueError(f"{path}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    text = str(error)
    if unknown := re.search(r"Unsupported (?:global|class|type)[^:]*: (?:GLOBAL )?(\S+)", text):
        return (
            f"holds a pickled {unknown[1]}, and reading that would run code; save weights alone:"
            " torch.save(net.state_dict(), path)"
        )
    if "TorchScript" in text:
        return "a TorchScript archive, not weights; save net.state_dict() instead"
    if isinstance(error, (UnpicklingError, EOFError, KeyError, IndexError)):
        return "neither a torch nor a safetensors file of weights, or a damaged one"
    return f"cut short or damaged: {text.strip().splitlines()[0] if text.strip() else error!r}"


def _tensors(held: object) -> dict[str, Tensor]:
    """The named tensors of the one mapping that has some, or of several, keys joined by dots."""
    if not isinstance(held, Mapping):
        return {}
    for key in WRAPPERS:
        if isinstance(held.get(key), Mapping) and (inner := _tensors(held[key])):
            return inner
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in held.items():
        if not isinstance(key, str) or key.lower().startswith(("optim", "scheduler")):
            continue
        if isinstance(value, Tensor):
            found[key] = value
        elif inner := _tensors(value):
            parts[key] = inner
    if len(parts) == 1 and not any(tensor.dim() for tensor in found.values()):
        return next(iter(parts.values()))  # a wrapper by another name, numbers beside it
    for key, inner in parts.items():
        found |= {f"{key}.{name}": tensor for name, tensor in inner.items()}
    return found


def plain(names: Iterable[str]) -> list[str]:
    """The same names, in order, without the prefixes that wrappers leave; unchanged where two
    names would become one."""
    given = list(names)
    names = [name.replace("_orig_mod.", "") for name in given]
    while True:
        if len(set(names)) < len(names):
            return given
        inner = [
            next((name.removeprefix(p) for p in PREFIXES if name.startswith(p)), name)
            for name in names
        ]
        if inner == names:
            return names
        names = inner


def common(names: Iterable[str]) -> dict[str, str]:
    """Each name -> what it has in common with other spellings of the same tensor.

    The classifier is `linear`, `fc`, `classifier` or `head`; a 1x1 shortcut and its batch norm are
    `shortcut` and `bn3`, or `shortcut.0` and `shortcut.1`, or the same of `downsample`.
    """
    given = list(names)
    bare = dict(zip(given, plain(given), strict=True))
    everything = set(bare.values())
    found = {}
    for name, short in bare.items():
        short = re.sub(r"^(linear|fc|classifier|head)\.(weight|bias)$", r"classifier.\2", short)
        short = re.sub(r"(^|\.)(shortcut|downsample)\.0\.(\w+)$", r"\1shortcut.conv.\3", short)
        short = re.sub(r"(^|\.)(shortcut|downsample)\.1\.(\w+)$", r"\1shortcut.norm.\3", short)
        short = re.sub(r"(^|\.)(shortcut|downsample)\.(weight|bias)$", r"\1shortcut.conv.\3", short)
        # Only the norm of a shortcut of that name: in a bottleneck, bn3 is the branch's own.
        if norm := re.fullmatch(r"(.*\.|)bn3\.(\w+)", short):
            at = norm[1]
            if f"{at}shortcut.weight" in everything:
                short = f"{at}shortcut.norm.{norm[2]}"
        found[name] = short
    return found if len(set(found.values())) == len(found) else bare


def outline(weights: Mapping[str, Tensor]) -> str:
    """Depth, widths and classes, as far as names and shapes tell; for messages."""
    blocks: dict[str, set[str]] = {}
    widths: dict[str, int] = {}
    classes = None
    for name, tensor in weights.items():
        if stage := re.match(r"(.*?)\.(\d+)\.", name):
            blocks.setdefault(stage[1], set()).add(stage[2])
            if tensor.dim() == 4 and "conv" in name:
                widths[stage[1]] = tensor.shape[0]
        if tensor.dim() == 2 and common([name])[name] == "classifier.weight":
            classes = tensor.shape[0]
    parts = [f"{len(weights)} tensors"]
    if blocks:
        parts.append(f"depth {tuple(len(each) for each in blocks.values())}")
    if widths:
        parts.append(f"widths {tuple(widths.values())}")
    if classes is not None:
        parts.append(f"{classes} classes")
    return ", ".join(parts)


def fit_into(
    module: nn.Module, weights: Mapping[str, Tensor], path: str | Path = "the weights"
) -> None:
    """Fill `module` with all of `weights`, by name, or by what their names have in common.

    A batch norm's count of batches may be missing, or be given where there is none. Nothing is
    changed unless everything fits. `path` is where they are from.

    Raises ValueError with that name, what was expected and what was found.
    """
    wanted = module.state_dict()
    source = {name: name for name in wanted if name in weights}
    free = {name: key for name, key in common(weights).items() if name not in source}
    by_common = {key: name for name, key in free.items()}
    for name, key in common(wanted).items():
        if name not in source and key in by_common:
            source[name] = by_common[key]
    missing = [name for name in wanted if name not in source and not _count(name)]
    taken = set(source.values())
    unexpected = [name for name in weights if name not in taken and not _count(name)]
    differ = []
    for name, given in source.items():
        mine, theirs = wanted[name], weights[given]
        if mine.shape != theirs.shape:
            differ.append(f"{given} {tuple(theirs.shape)} where {tuple(mine.shape)} is expected")
        elif mine.is_floating_point() != theirs.is_floating_point():
            differ.append(f"{given} of {theirs.dtype} where {mine.dtype} is expected")
    if missing or unexpected or differ:
        told = [
            f"{path}: what it holds does not fit; expected {outline(wanted)}",
            f"found {outline(weights)}",
            *(
                f"{what}: {first(names)}"
                for what, names in (
                    ("missing", missing),
                    ("unexpected", unexpected),
                    ("different", differ),
                )
                if names
            ),
        ]
        raise ValueError("; ".join(told))
    module.load_state_dict({name: weights[given] for name, given in source.items()}, strict=False)


def _count(name: str) -> bool:
    return name.endswith(("num_batches_tracked", "n_averaged"))


def first(names: list[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
