"""Batches in memory: what augmentation does, pixel by pixel, and what a batch is."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.data import NO_LABEL, Dataset, augment, to_float


def dataset(
    images: Tensor, labels: Tensor, flips: bool, pad: int, ignore: int = NO_LABEL
) -> Dataset:
    count = images.shape[1]
    mean, std = [0.25, 0.5, 0.75][:count], [0.5, 0.25, 0.2][:count]
    classes = ("a", "b", "c")
    return Dataset("x", images, labels, images, labels, classes, mean, std, flips, pad, ignore)


def plain(image: Tensor, pad: int, dy: int, dx: int, mirrored: bool) -> Tensor:
    """One image, moved pixel by pixel: black comes in from outside; the mirror turns the result."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + dy - pad, x + dx - pad
            if 0 <= from_y < height and 0 <= from_x < width:
                out[:, y, width - 1 - x if mirrored else x] = image[:, from_y, from_x]
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(2, 6),
    st.integers(2, 6),
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_each_image_is_one_shift_and_mirror_of_itself(
    channels: int, height: int, width: int, pad: int, flips: bool, seed: int
) -> None:
    fill = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (5, channels, height, width), generator=fill).byte()
    data = dataset(images, torch.zeros(5).long(), flips, pad)
    made = augment(images, data, torch.Generator().manual_seed(seed))
    for image, found in zip(images, made, strict=True):
        moves = [
            (dy, dx, mirrored)
            for dy in range(2 * pad + 1)
            for dx in range(2 * pad + 1)
            for mirrored in ((False, True) if flips else (False,))
        ]
        assert any(torch.equal(found, plain(image, pad, *move)) for move in moves)


def test_the_draws_are_shifts_down_then_right_then_mirrors() -> None:
    # The order is pinned: what was trained with a seed can be trained again.
    images = torch.arange(1, 1 + 40 * 12).reshape(40, 1, 3, 4).remainder(255).byte()
    made = augment(images, dataset(images, torch.zeros(40).long(), True, 2), _seed(3))
    generator = _seed(3)
    dy = torch.randint(0, 5, (40, 1), generator=generator)
    dx = torch.randint(0, 5, (40, 1), generator=generator)
    mirrored = torch.rand((40, 1), generator=generator) < 0.5
    for row in range(40):
        move = int(dy[row]), int(dx[row]), bool(mirrored[row])
        assert torch.equal(made[row], plain(images[row], 2, *move))


def _seed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_shift_comes_up_equally_often_and_half_are_mirrored() -> None:
    images = torch.arange(1, 10).reshape(1, 1, 3, 3).byte().expand(4500, 1, 3, 3)
    made = augment(images, dataset(images, torch.zeros(4500).long(), True, 1), _seed(0))
    counts: dict[bytes, int] = {}
    for image in made:
        key = image.numpy().tobytes()
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 18  # nine shifts, each mirrored or not
    assert min(counts.values()) > 180 and max(counts.values()) < 320  # 250 each, within 5 sigma


def test_without_flips_nothing_is_mirrored_and_without_pad_nothing_moves() -> None:
    images = torch.randint(0, 256, (50, 3, 4, 4), generator=_seed(0)).byte()
    still = dataset(images, torch.zeros(50).long(), False, 0)
    assert torch.equal(augment(images, still, _seed(1)), images)
    turned = augment(images, dataset(images, torch.zeros(50).long(), True, 0), _seed(1))
    same = (turned == images).flatten(1).all(1)
    assert torch.equal(turned[~same], images[~same].flip(-1)) and 10 < int(same.sum()) < 40


def test_masks_move_with_their_images_and_what_comes_in_has_no_label() -> None:
    masks = torch.randint(0, 3, (60, 5, 4), generator=_seed(0)).byte()
    images = (masks[:, None] + 1).expand(60, 3, 5, 4).contiguous()  # the mask can be read off
    data = dataset(images, masks, True, 2, ignore=2)
    x, y = data.batch(torch.arange(60), _seed(5))
    assert y.dtype == torch.int64 and data.targets == "masks"
    pixels = (
        x * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
    ) * 255
    value = pixels.round().long()[:, 0]
    expected = torch.where((value == 0) | (value == 3), NO_LABEL, value - 1)
    assert torch.equal(y, expected)
    assert torch.equal(pixels.round().byte(), augment(images, data, _seed(5)))


def test_a_batch_is_normalised_pixels_and_their_labels() -> None:
    images = torch.randint(0, 256, (7, 3, 4, 5), generator=_seed(0)).byte()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    data = dataset(images, labels, True, 1)
    rows = torch.tensor([6, 2])
    x, y = data.batch(rows, _seed(0), augment=False)
    assert x.dtype == torch.float32 and y.tolist() == [0, 2]
    assert torch.allclose(x[0, 2], (images[6, 2] / 255.0 - 0.75) / 0.2)
    assert torch.allclose(x[1, 0], (images[2, 0] / 255.0 - 0.25) / 0.5)
    moved, _ = data.batch(rows, _seed(4))
    assert torch.equal(moved, to_float(augment(images[rows], data, _seed(4)), data))
    assert (len(data), data.shape, data.targets) == (7, (3, 4, 5), "classes")


def test_batches_follow_their_seeds_and_test_batches_are_all_images_in_order() -> None:
    images = torch.randint(0, 256, (7, 1, 4, 4), generator=_seed(0)).byte()
    data = dataset(images, torch.arange(7) % 3, True, 1)
    plan = [(torch.tensor([1, 2]), 8), (torch.tensor([1, 2]), 9)]
    for (rows, seed), (x, y) in zip(plan, data.batches(plan), strict=True):
        expected = data.batch(rows, _seed(seed))
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    found = list(data.test_batches(3))
    assert [len(x) for x, _ in found] == [3, 3, 1]
    assert torch.equal(torch.cat([x for x, _ in found]), to_float(images, data))
    assert torch.equal(torch.cat([y for _, y in found]), torch.arange(7) % 3)


def test_the_digest_follows_every_pixel_and_label() -> None:
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    one = dataset(images, torch.zeros(2).long(), False, 0)
    other = images.clone()
    other[1, 0, 1, 1] = 1
    digests = {
        one.digest(),
        dataset(other, one.train_labels, False, 0).digest(),
        dataset(images, torch.tensor([0, 1]), False, 0).digest(),
    }
    assert len(digests) == 3 and one.digest() == dataset(images, one.train_labels, True, 1).digest()
