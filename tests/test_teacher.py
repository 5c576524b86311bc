"""A teacher's outputs for fixed views of the training images: made once, kept, the same again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import data
from training.data import to_float
from training.data.dataset import moved
from training.state import BadState
from training.teacher import Views


@pytest.mark.parametrize("flips", [False, True])
def test_views_are_moved_images_with_the_teachers_outputs_for_them(
    flips: bool, tmp_path: Path
) -> None:
    digits = data.load("digits")
    digits = replace(
        digits,
        train_images=digits.train_images[:520],
        train_labels=digits.train_labels[:520],
        flips=flips,
    )
    seen: list[Tensor] = []

    def teacher(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.stack((x.flatten(1).sum(1), x[:, 0, 0, 0]), 1)

    state = tmp_path / "teacher.pt"
    views = Views(digits, teacher, 2, 0, state)
    rows = torch.arange(len(digits)).flip(0)
    first, labels, outputs = views.batch(rows, 0)
    second, _, _ = views.batch(rows, 1)
    assert torch.equal(labels, digits.train_labels[rows].long())
    torch.testing.assert_close(outputs, teacher(first).half().float())
    assert not torch.equal(first, second)  # each pass moves the images in its own way
    used = set()
    for row, image in zip(rows[:16], first, strict=False):
        one = digits.train_images[row : row + 1]
        ways = {
            (dy, dx, turn): to_float(
                moved(one, 1, torch.tensor([[dy]]), torch.tensor([[dx]]), torch.tensor([[turn]])),
                digits,
            )[0]
            for dy in range(3)
            for dx in range(3)
            for turn in {False, flips}
        }
        way = next((way for way, moved_ in ways.items() if torch.equal(image, moved_)), None)
        assert way is not None
        used.add(way)
    assert len({way[:2] for way in used}) > 4 and len({turn for *_, turn in used}) == 1 + flips
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(state.read_bytes()[:-1000])
    with pytest.raises(BadState, match="damaged.pt: damaged, cut short"):
        Views(digits, teacher, 2, 0, damaged)
    seen.clear()
    again = Views(digits, teacher, 3, 0, state)  # two passes are kept, the third is made
    assert sum(len(x) for x in seen) == len(digits)
    assert torch.equal(again.batch(rows, 0)[2], outputs)
    seen.clear()
    fewer = Views(digits, teacher, 1, 0, state)
    assert len(fewer.outputs) == 1 and not seen
