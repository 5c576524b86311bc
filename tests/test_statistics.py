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


@pytest.mark.parametrize("name", NORMED)
@torch.no_grad()
def test_measured_moments_are_those_of_torchs_training_pass(name: str) -> None:
    _, graph = traced(name)
    module = seeded((MODULES | DEEP)[name][0])
    x = images_of(name, 12)
    found = measure(graph, graph.full, module.state_dict(), x)
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


def test_measuring_reads_no_statistics_that_are_among_the_tensors() -> None:
    module, graph = traced("resnet")
    state, x = module.state_dict(), images_of("resnet", 8)
    without = {name: value for name, value in state.items() if "running" not in name}
    one, other = (measure(graph, graph.full, held, x) for held in (state, without))
    assert list(one) == [node.name for node in graph.nodes if node.op == "batch_norm"]
    for name, pair in one.items():
        assert torch.equal(pair[0], other[name][0]) and torch.equal(pair[1], other[name][1])


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
