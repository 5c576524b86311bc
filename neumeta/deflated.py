"""A tensor's bytes, deflated (RFC 1950) and inflated: eight-bit weights and images take a seventh less.

Knows no file, no name and no manifold.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

WORTH = 0.05, 256
"""A tensor stays as it is unless this share of its bytes, and so many, are saved: the rest would only
take time to read, and a header tells what is deflated."""
MOST = 64
"""How many bytes one may stand for: a file that is not trusted cannot make much more than it has."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    )
}
"""What is deflated, by the name that a header has for it."""


def raw_bytes(tensor: Tensor) -> bytes:
    """The tensor's numbers as they lie in memory, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()


def deflated(tensor: Tensor) -> UInt8[Tensor, " M"] | None:
    """The tensor's bytes, deflated; None where that saves too little or too much. Equal tensors give
    equal bytes with one zlib."""
    if tensor.dtype not in DTYPES.values():
        return None
    raw = raw_bytes(tensor)
    packed = zlib.compress(raw, 9)
    share, bytes_saved = WORTH
    if len(raw) - len(packed) < max(share * len(raw), bytes_saved) or len(raw) > MOST * len(packed):
        return None
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def inflated(packed: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor that was deflated. Never makes more than its dtype and shape say, nor more than `MOST`
    bytes for each that there is.

    Raises ValueError if the bytes are damaged, or not those of such a tensor.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 1:
        raise ValueError(f"deflated bytes are {packed.dtype} {tuple(packed.shape)}, not bytes")
    if dtype not in DTYPES:
        raise ValueError(f"deflated bytes of {dtype!r}; known are {', '.join(DTYPES)}")
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"deflated bytes of shape {shape!r}, which is none")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if wanted > MOST * len(packed):
        raise ValueError(f"{len(packed)} deflated bytes cannot be those of {dtype} {tuple(shape)}")
    reader = zlib.decompressobj()
    try:
        raw = reader.decompress(packed.numpy().tobytes(), wanted + 1)
    except zlib.error as error:
        raise ValueError(f"deflated bytes are damaged: {error}") from None
    if len(raw) != wanted or not reader.eof or reader.unused_data:
        raise ValueError(f"deflated bytes are not those of {dtype} {tuple(shape)}")
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).view(tuple(shape))
