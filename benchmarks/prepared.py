"""A recipe up to where its fit begins: data, source network, graph and untrained manifold. Knows no
benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from neumeta.graph import Graph
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sites import made
from neumeta.space import Architecture, Space
from training import basis, data, fit, pipeline, source
from training.recipe import Recipe
from training.task import TASKS, Task


def score(
    space: Space,
    architecture: Architecture,
    weights: dict[str, Tensor],
    loaded: data.Data,
    task: Task,
) -> float:
    """Of these folded weights, as a device runs them, on all test images."""
    program = Program(space.graph_of(architecture).folded, space.sizes(architecture))
    return source.score(lambda x: program.run(weights, x), loaded, task)


@dataclass(frozen=True)
class Prepared:
    """What the stages before the fit made: `smoothed` are the source's tensors in the recipe's order,
    folded if `asked.folded`."""

    asked: Recipe
    data: data.Data
    task: Task
    graph: Graph
    net: nn.Module
    manifold: Manifold
    smoothed: dict[str, Tensor]

    @property
    def targets(self) -> dict[str, Tensor]:
        """The smoothed tensors that the representation makes."""
        return {name: self.smoothed[name] for name in made(self.manifold.space.graph)}

    def fit(self, run: Path) -> Manifold:
        """The manifold, fitted as the recipe says; resumes what `run` holds."""
        done = fit.fit(
            self.manifold, self.smoothed, self.data, self.task, self.asked, run, resume=True
        )
        assert done
        return self.manifold


def prepare(asked: Recipe, root: Path | None, run: Path, checkpoints: Path = Path()) -> Prepared:
    """The recipe's stages before the fit; the trained source is kept in `run`."""
    loaded = basis.dataset(asked, root)
    run.mkdir(parents=True, exist_ok=True)
    found = basis.check(asked, loaded, checkpoints, run)
    net = pipeline.trained_source(asked, loaded, found.module, checkpoints, run)
    manifold, smoothed = pipeline.prepare(asked, loaded, found.graph, net)
    task = TASKS[asked.task]
    return Prepared(asked, loaded, task, found.graph, net, manifold, smoothed)
