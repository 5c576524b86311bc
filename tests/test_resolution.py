"""Growing images: each resolution lasts as long, and a smaller image is the same image."""

from __future__ import annotations

import torch

from training.resolution import resolution, shrunk


def test_images_grow_in_equal_parts_of_the_steps() -> None:
    shares = [resolution((0.5, 0.75, 1.0), step, 9) for step in range(9)]
    assert shares == [0.5] * 3 + [0.75] * 3 + [1.0] * 3
    assert resolution((0.5, 0.75, 1.0), 0, 1) == 0.5
    assert {resolution((1.0,), step, 9) for step in range(9)} == {1.0}


def test_smaller_images_keep_their_brightness_and_lose_what_is_too_fine() -> None:
    flat = torch.full((2, 3, 8, 12), 0.7)
    torch.testing.assert_close(shrunk(flat, 0.5), torch.full((2, 3, 4, 6), 0.7))
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    # Sampling every second pixel would give 1 or -1 everywhere.
    assert shrunk(stripes, 0.5)[..., 2:-2].abs().max() < 0.2
    # Nor is it enough to mix the two pixels in the middle of every four: they are always alike here.
    fours = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(8).expand(1, 1, 32, 32)
    assert shrunk(fours, 0.25)[..., 1:-1].abs().max() < 0.5
    assert shrunk(flat, 1.0) is flat
    assert shrunk(torch.full((1, 1, 2, 8), 0.7), 0.25).shape == (1, 1, 1, 2)  # one pixel is left
