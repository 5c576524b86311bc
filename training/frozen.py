"""The leading part of a network that nothing trains: what it makes of the training images, made once.

Knows no representation's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from neumeta.program import Program
from neumeta.sample import seed_of
from neumeta.sites import reached
from neumeta.space import Space
from training.data import Dataset
from training.layout import channels_last
from training.recipe import Recipe
from training.regression import Tensors


def steps(space: Space) -> int:
    """How many leading operations of the network nothing that morphs has a part in."""
    behind = reached(space.graph)
    return [node.name in behind for node in space.graph.nodes].index(True)


@torch.no_grad()
def features(
    space: Space, source: Tensors, first: int, data: Dataset, recipe: Recipe, device: torch.device
) -> list[dict[str, Tensor]]:
    """What the operations from `first` on read, by name, for each of `feature_views` passes over the
    training images: (N, ...) float16.

    The first pass is unaugmented, so that one view is the plain training set.
    """
    program = Program(space.graph, space.graph.full)
    laid_out = {name: channels_last(value) for name, value in source.items()}
    views = []
    for view in range(recipe.fit.feature_views):
        generator = torch.Generator().manual_seed(seed_of(recipe.seed, f"view/{view}"))
        parts: dict[str, list[Tensor]] = {}
        starts = range(0, len(data), 100)  # what is at work fits the cache
        for at in tqdm(starts, desc=f"frozen part, view {view + 1}", mininterval=2):
            rows = torch.arange(at, min(at + 100, len(data)))
            x, _ = data.batch(rows, generator, augment=bool(view))
            for name, value in program.leading(
                laid_out, channels_last(x.to(device)), first
            ).items():
                parts.setdefault(name, []).append(value.half().cpu().contiguous())
        views.append({name: torch.cat(each) for name, each in parts.items()})
    return views
