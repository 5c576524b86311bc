"""A recipe's stages up to the fit, for tests that train nothing or little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neumeta.manifold import Manifold, roles
from neumeta.representation import build
from neumeta.representation.base import Representation
from neumeta.space import Architecture, Space
from training import basis, data, fit, networks, pipeline
from training.recipe import Recipe
from training.task import TASKS
from training.trace import trace


def source(asked: Recipe, loaded: data.Data, folder: Path) -> nn.Module:
    """The source network of a recipe, trained as it says."""
    net = basis.network(asked, loaded)
    return pipeline.trained_source(asked, loaded, net, Path("none"), folder)


def prepared(asked: Recipe, loaded: data.Data, folder: Path) -> tuple[Manifold, dict[str, Tensor]]:
    """The manifold before its fit, and the tensors of the smoothed source."""
    net = source(asked, loaded, folder)
    return pipeline.prepare(asked, loaded, basis.traced(asked, loaded, net).graph, net)


def gradients(
    manifold: Manifold,
    smoothed: dict[str, Tensor],
    loaded: data.Data,
    asked: Recipe,
    sizes: tuple[Architecture, ...],
    folder: Path,
) -> dict[str, Tensor]:
    """The gradients of a fit's one step, which trains these sizes, by parameter. The representation is
    left as it was before the step."""
    before: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def recorded(model: nn.Module, *_: Any) -> bool:
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "choose", lambda *_: sizes)
        patch.setattr(fit, "_finish", recorded)
        assert fit.fit(manifold, smoothed, loaded, TASKS[asked.task], asked, folder)
    manifold.representation.load_state_dict(before)
    manifold.representation.zero_grad()
    assert found
    return found


def space(asked: Recipe, loaded: data.Data) -> Space:
    """The architectures that a recipe's manifold covers on this data."""
    net = basis.network(asked, loaded)
    return basis.space(asked, basis.traced(asked, loaded, net).graph)


def representation(kind: str, options: dict[str, Any]) -> Representation:
    """An untrained representation of LeNet's widths."""
    graph, _ = trace(networks.lenet(), torch.zeros(1, 1, 8, 8))
    return build(kind, options, roles(Space("lenet", graph, (0.25, 1.0))))
