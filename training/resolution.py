"""Growing images: which resolution a step trains on, and images in it.

Most of what a network learns it learns from small images, at a fraction of the cost (progressive
resizing). Knows no network and no recipe.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resolution(stages: Sequence[float], step: int, steps: int) -> float:
    """The share of the images' full side that `step` of `steps` trains on: each stage lasts as long."""
    return stages[step * len(stages) // steps]


def shrunk(x: Float[Tensor, "N C H W"], share: float) -> Float[Tensor, "N C h w"]:
    """Images with both sides multiplied by `share`, smoothed so that no frequency folds over."""
    if share == 1:
        return x
    height, width = (max(1, round(side * share)) for side in x.shape[2:])
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True)
