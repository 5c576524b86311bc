"""Deflated tensors come back, and take less."""

from __future__ import annotations

import tracemalloc
import zlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from neumeta.deflated import DTYPES, MOST, deflated, inflated


@given(
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 12), max_size=4),
    st.sampled_from([1, 3, 100]),
    st.integers(0, 99),
)
def test_what_was_deflated_comes_back(dtype: str, shape: list[int], spread: int, seed: int) -> None:
    numbers = torch.randint(0, spread, shape, generator=torch.Generator().manual_seed(seed))
    tensor = numbers.to(DTYPES[dtype])
    packed = deflated(tensor)
    size = tensor.numel() * tensor.element_size()
    if packed is None:
        return
    assert len(packed) <= size - 256 and len(packed) <= 0.95 * size <= MOST * len(packed)
    again = inflated(packed, dtype, shape)
    assert again.dtype == tensor.dtype and torch.equal(again, tensor)


def test_weights_of_eight_bits_take_less_and_noise_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(50_000, generator=generator) * 30).round().clamp(-127, 127)
    packed = deflated(weights.to(torch.int8))
    assert packed is not None and len(packed) < 0.92 * len(weights)
    noise = torch.randint(-128, 128, (50_000,), generator=generator).to(torch.int8)
    assert deflated(noise) is None
    assert deflated(torch.zeros(256, dtype=torch.uint8)) is None
    assert deflated(torch.zeros(300, dtype=torch.uint8)) is not None
    assert deflated(torch.zeros(10_000, dtype=torch.uint8)) is None  # as if it were a bomb
    assert deflated(torch.zeros(300, dtype=torch.bool)) is None


@pytest.mark.parametrize("shape", [(299,), (301,), (3, 100), (0,), ()])
def test_only_the_shape_it_had_is_made(shape: tuple[int, ...]) -> None:
    packed = deflated(torch.zeros(300, dtype=torch.uint8))
    assert packed is not None
    if torch.Size(shape).numel() == 300:
        assert inflated(packed, "uint8", shape).shape == shape
        return
    with pytest.raises(ValueError, match="not those of uint8"):
        inflated(packed, "uint8", shape)


@pytest.mark.parametrize("told", [1 << 20, 1 << 26])
def test_a_bomb_takes_no_memory(told: int) -> None:
    """64 MiB of zeros, in a file that tells of one MiB, or of all of them."""
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 26), 9)), dtype=torch.uint8)
    tracemalloc.start()
    with pytest.raises(ValueError, match="deflated bytes"):
        inflated(bomb, "uint8", [told])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
