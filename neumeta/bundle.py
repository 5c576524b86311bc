"""Many small tensors as a few long ones, so that the header of their file is short.

Knows no file and no representation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor


def bundled(tensors: Mapping[str, Tensor]) -> dict[str, Shaped[Tensor, " M"]]:
    """All numbers of one dtype whose names begin alike (two words, as `parts.3`) in one vector, in the
    order of their names: `parts.3.int8`."""
    return {
        bundle: torch.cat([tensors[name].flatten() for name in names])
        for bundle, names in _names(tensors).items()
    }


def parted(bundles: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were bundled, in the names, shapes and dtypes of `like`.

    Raises ValueError if the bundles are not those of such tensors.
    """
    wanted = _names(like)
    if other := sorted(wanted.keys() ^ bundles.keys()):
        raise ValueError(f"{other[0]} is {'missing' if other[0] in wanted else 'not wanted'}")
    found = {}
    for bundle, names in wanted.items():
        held, sizes = bundles[bundle], [like[name].numel() for name in names]
        if held.shape != (sum(sizes),) or held.dtype != like[names[0]].dtype:
            told = f"{held.dtype} {tuple(held.shape)}"
            raise ValueError(f"{bundle} is {told}, not {like[names[0]].dtype} {(sum(sizes),)}")
        for name, part in zip(names, torch.split(held, sizes), strict=True):
            found[name] = part.view(like[name].shape)
    return found


def _names(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of the tensors in every bundle, in order."""
    found: dict[str, list[str]] = {}
    for name in sorted(tensors):
        found.setdefault(_bundle(name.split("."), tensors[name].dtype), []).append(name)
    return found


def _bundle(words: Iterable[str], dtype: torch.dtype) -> str:
    first, second, *_ = words
    return f"{first}.{second}.{str(dtype).removeprefix('torch.')}"
