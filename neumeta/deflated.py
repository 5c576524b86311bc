"""A tensor's bytes, deflated (RFC 1950) and inflated: whole numbers and images take a sixth less.

Knows no file, no name and no manifold.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

WORTH = 0.05, 256
"""A tensor stays as it is unless this share of its bytes, and so many, are saved: the rest would only
take time to read, and a header tells what is deflated."""


def deflated(tensor: Tensor) -> UInt8[Tensor, " M"] | None:
    """The tensor's bytes, deflated; None where that saves too little. Equal tensors give equal bytes
    with one zlib."""
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    packed = zlib.compress(raw, 9)
    share, bytes_saved = WORTH
    if len(raw) - len(packed) < max(share * len(raw), bytes_saved):
        return None
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def inflated(
    packed: UInt8[Tensor, " M"], dtype: torch.dtype, shape: Sequence[int]
) -> Tensor:
    """The tensor that was deflated. Never makes more than its dtype and shape say.

    Raises ValueError if the bytes are damaged, or not those of such a tensor.
    """
    like = torch.empty(tuple(shape), dtype=dtype, device="meta")
    wanted = like.numel() * like.element_size()
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(packed.numpy().tobytes(), wanted + 1)
    except zlib.error as error:
        raise ValueError(f"deflated bytes are damaged: {error}") from None
    if len(raw) != wanted or not reader.eof or reader.unused_data:
        raise ValueError(f"deflated bytes are not those of {dtype} {tuple(shape)}")
    if not wanted:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(tuple(shape))
