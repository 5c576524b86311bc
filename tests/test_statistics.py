"""Batch statistics of any graph: measured like torch's own training pass, kept and unfolded again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neumeta.statistics import flatten, measure, unflatten
from tests.support.modules import DEEP, MODULES, halved, images_of, seeded, traced

NORMED = [
    name
    for name in (*MODULES, *DEEP)
    if any(node.op == "batch_norm" for node in traced(name)[1].nodes)
]


def unmeasured(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a module without its batch norms' statistics."""
    return {n: value for n, value in module.state_dict().items() if "running" not in n}


@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_measured_moments_are_those_of_torchs_training_pass(name: str) -> None:
    _, graph = traced(name)
    module = seeded((MODULES | DEEP)[name][0])
    x = images_of(name, 12)
    found = measure(graph, graph.full, unmeasured(module), x)
    norms = {
        path: each
        for path, each in module.named_modules()
        if isinstance(each, nn.modules.batchnorm._BatchNorm)
    }
    for each in norms.values():
        each.train()
        each.momentum = 1.0
    module(x)
    by_module = {node.module: node for node in graph.nodes if node.op == "batch_norm"}
    assert set(by_module) == set(norms)
    for path, norm in norms.items():
        mean, variance = found[by_module[path].name]
        # float32 sums of some hundred terms in another order
        torch.testing.assert_close(mean, norm.running_mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(variance, norm.running_var, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_statistics_that_are_among_the_tensors_are_not_measured_and_those_behind_see_them() -> None:
    module, graph = traced("resnet")
    state, x = unmeasured(module), images_of("resnet", 8)
    given = (torch.tensor([0.25, -1.0, 0.5, 0.0]), torch.tensor([1.0, 4.0, 0.5, 2.0]))
    state |= {"bn1.running_mean": given[0], "bn1.running_var": given[1]}
    found = measure(graph, graph.full, state, x)
    assert list(found) == [node.name for node in graph.nodes if node.op == "batch_norm"]
    assert torch.equal(found["bn1"][0], given[0]) and torch.equal(found["bn1"][1], given[1])
    stem = torch.nn.functional.conv2d(x, state["conv1.weight"], padding=1)
    stem = torch.nn.functional.batch_norm(stem, *given, state["bn1.weight"], state["bn1.bias"])
    read = torch.nn.functional.conv2d(stem.relu(), state["layer1.0.conv1.weight"], padding=1)
    variance, mean = torch.var_mean(read, (0, 2, 3))
    torch.testing.assert_close(found["layer1.0.bn1"], (mean, variance), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flattened_moments_come_back(name: str, dtype: torch.dtype) -> None:
    _, graph = traced(name)
    for sizes in (graph.full, halved(graph)):
        moments = {
            node.name: (torch.randn(count), torch.rand(count))
            for node in graph.nodes
            if node.op == "batch_norm"
            for count in graph.shape(node.tensors["mean"], sizes)
        }
        kept = flatten(moments).to(dtype)
        back = unflatten(graph, sizes, kept)
        assert list(back) == list(moments)
        for key, pair in moments.items():
            for one, other in zip(back[key], pair, strict=True):
                torch.testing.assert_close(one, other.to(dtype).float())
