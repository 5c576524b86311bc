"""What networks of every size make of the same images or codes, side by side. Trains nothing itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.subject import Subject
from neumeta.program import Program
from training.task import TASKS

SHOWN = 6
"""Pictures in a row of the figure."""
COLOURS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
    (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
"""CamVid's own colours of its eleven classes; what has no class is black."""


Image = np.ndarray


def masks(subject: Subject) -> dict[str, list[Image]]:
    """Test images, their masks, and those of the networks of every size, by row of the figure."""
    tests = subject.tests
    rows = torch.arange(SHOWN) * (len(tests.test_images) // SHOWN)
    some = replace(tests, test_images=tests.test_images[rows], test_labels=tests.test_labels[rows])
    x, truth = next(iter(some.test_batches()))
    found = {
        "image": [_pixels(each) for each in some.test_images.float() / 255],
        "true mask": [coloured(each) for each in truth],
    }
    for label, (program, weights) in subject.networks().items():
        with torch.no_grad():  # not around `networks`, which may train
            logits = TASKS[subject.asked.task].read(program.run(weights, x))
        found[label] = [coloured(each) for each in logits.argmax(1)]
    return found


def samples(subject: Subject) -> dict[str, list[Image]]:
    """What the decoders of every size make of the same latent codes, by row of the figure."""
    found = {}
    for label, (program, weights) in subject.networks().items():
        latent = weights["decoder.lin1.weight"].shape[1]
        drawn = torch.randn(2 * SHOWN, latent, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():  # not around `networks`, which may train
            made = decoded(program, weights, drawn)
        found[label] = [_pixels(each) for each in made]
    return found


def decoded(program: Program, weights: Mapping[str, Tensor], codes: Tensor) -> Tensor:
    """The pixels that the second half of a variational autoencoder makes of latent codes (N, Z)."""
    # The codes' mean is an output; the first operation that reads it begins the decoder.
    latent = [value for _, value in program.outputs][1:]
    first = next(k for k, step in enumerate(program.steps) if latent[0] in step.inputs)
    made: Any = program.run(weights, dict.fromkeys(latent, codes), first=first)
    pixels: Tensor = made[0]
    return pixels


def coloured(mask: Tensor) -> Image:
    """Classes (H, W) as colours (H, W, 3) in 0..1."""
    palette = np.array((*COLOURS, (0, 0, 0))) / 255
    classes = mask.numpy()
    return palette[np.where(classes < 0, len(COLOURS), classes)]


def _pixels(image: Tensor) -> Image:
    """(C, H, W) -> (H, W, C)."""
    array: Image = image.movedim(0, 2).numpy()
    return array
