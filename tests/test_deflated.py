"""Deflated tensors come back, and take less."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from neumeta.deflated import deflated, inflated

DTYPES = [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32]


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 12), max_size=4),
    st.sampled_from([1, 3, 100]),
    st.integers(0, 99),
)
def test_what_was_deflated_comes_back(
    dtype: torch.dtype, shape: list[int], spread: int, seed: int
) -> None:
    numbers = torch.randint(0, spread, shape, generator=torch.Generator().manual_seed(seed))
    tensor = numbers.to(dtype)
    packed = deflated(tensor)
    size = tensor.numel() * tensor.element_size()
    if packed is None:
        return
    assert len(packed) <= size - 256 and len(packed) <= 0.95 * size
    again = inflated(packed, dtype, shape)
    assert again.dtype == dtype and torch.equal(again, tensor)
    again.zero_()  # its memory is its own
    assert torch.equal(inflated(packed, dtype, shape), tensor)


def test_weights_of_eight_bits_take_less_and_noise_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(50_000, generator=generator) * 30).round().clamp(-127, 127)
    packed = deflated(weights.to(torch.int8))
    assert packed is not None and len(packed) < 0.92 * len(weights)
    noise = torch.randint(-128, 128, (50_000,), generator=generator).to(torch.int8)
    assert deflated(noise) is None
    assert deflated(torch.zeros(256, dtype=torch.uint8)) is None
    assert deflated(torch.zeros(300, dtype=torch.uint8)) is not None


@pytest.mark.parametrize("shape", [(299,), (301,), (3, 100), (0,), ()])
def test_only_the_shape_it_had_is_made(shape: tuple[int, ...]) -> None:
    packed = deflated(torch.zeros(300, dtype=torch.uint8))
    assert packed is not None
    if torch.Size(shape).numel() == 300:
        assert inflated(packed, torch.uint8, shape).shape == shape
        return
    with pytest.raises(ValueError, match="not those of torch.uint8"):
        inflated(packed, torch.uint8, shape)
