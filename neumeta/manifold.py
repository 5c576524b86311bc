"""A manifold in memory: the space it covers, its representation, and what does not morph.

Knows neither files nor requests: `checkpoint.py` reads and writes one, `sample.py` draws from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neumeta.coordinates import Site
from neumeta.representation.base import Representation
from neumeta.sites import sites
from neumeta.space import Space
from neumeta.statistics import Statistics


@dataclass(frozen=True)
class Contract:
    """What a network of the manifold takes and gives.

    Pixels in [0, 1] are normalised by `mean` and `std` per channel; `classes` are the names of the
    outputs, where they have any. `task` and `metric` say what the score is: percent right, mean IoU in
    percent, ELBO in nats; `higher` whether more of it is better.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    task: str = "classification"
    metric: str = "accuracy"
    higher: bool = True


@dataclass
class Manifold:
    """Everything needed to sample weights of any architecture in `space`.

    `frozen` are the source network's tensors outside the morphing scope, means and variances of the
    batch norms in front of it among them; `statistics` give the others theirs. `noise` is a, `samples`
    the default K, `scale` N.
    `about` is the checkpoint's own account: recipe, source, evaluation table, licence.
    """

    space: Space
    representation: Representation
    kind: str
    options: dict[str, Any]
    noise: float
    samples: int
    scale: int
    contract: Contract
    frozen: dict[str, Tensor] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=Statistics)
    about: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def device(self) -> torch.device:
        """Where the representation computes; the CPU, if it has no numbers."""
        first = next(self.representation.parameters(), None)
        return torch.device("cpu") if first is None else first.device


def roles(space: Space) -> dict[str, Site]:
    """Every parameter role the representation must make, with its first site in the source network."""
    found: dict[str, Site] = {}
    for site in sites(space, space.full).values():
        found.setdefault(site.role, site)
    return found
