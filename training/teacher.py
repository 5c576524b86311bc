"""The source network as a teacher: its outputs for fixed augmented views of the training images, made
once, and the same views again when a step asks for them.

Knows no manifold and no recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from neumeta.sample import seed_of
from training import state as states
from training.data import Dataset, to_float
from training.data.dataset import draw, moved


class Views:
    """`count` augmented passes over the images of `data`, each with the outputs (N, K) of `teacher`.

    Every image is moved and mirrored in one way in each pass, drawn from (seed, pass). Passes that are
    done are kept in the file `state`.
    """

    def __init__(
        self, data: Dataset, teacher: Callable[[Tensor], Tensor], count: int, seed: int, state: Path
    ) -> None:
        self.data = data
        self.moves = [
            draw(len(data), data, torch.Generator().manual_seed(seed_of(seed, f"teacher/{view}")))
            for view in range(count)
        ]
        self.outputs: list[Tensor] = []
        if state.exists():
            with states.loaded(state, "cpu") as kept:
                self.outputs = kept["outputs"][:count]
        for view in range(len(self.outputs), count):
            self.outputs.append(torch.cat(list(self._taught(teacher, view))))
            states.save({"outputs": self.outputs}, state)

    @torch.no_grad()
    def _taught(
        self, teacher: Callable[[Tensor], Tensor], view: int
    ) -> Iterator[Float[Tensor, "N K"]]:
        starts = range(0, len(self.data), 250)
        for at in tqdm(starts, desc=f"teacher, view {view + 1}", mininterval=5):
            rows = torch.arange(at, min(at + 250, len(self.data)))
            yield teacher(self.images(rows, view)).half().cpu()

    def images(self, rows: Int64[Tensor, " B"], view: int) -> Float[Tensor, "B C H W"]:
        """The normalised images of these rows as they are in pass `view`."""
        dy, dx, mirrored = self.moves[view]
        turned = None if mirrored is None else mirrored[rows]
        images = self.data.train_images[rows]
        shifted = moved(images, self.data.pad, dy[rows], dx[rows], turned)
        return to_float(shifted, self.data)

    def batch(
        self, rows: Int64[Tensor, " B"], view: int
    ) -> tuple[Float[Tensor, "B C H W"], Int64[Tensor, " B"], Float[Tensor, "B K"]]:
        """Images, classes and the teacher's outputs."""
        labels = self.data.train_labels[rows].long()
        return self.images(rows, view), labels, self.outputs[view][rows].float()
