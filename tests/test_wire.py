"""The bytes of the wire: known before they are made, and those that safetensors would write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from neumeta import wire
from neumeta.manifold import Manifold
from neumeta.notation import unpack
from neumeta.sample import sample
from tests.conftest import lenet
from tests.test_checkpoint import resnet


@pytest.mark.parametrize("dtype", list(wire.DTYPES))
@pytest.mark.parametrize("kind", ["mlp", "grid", "resnet"])
def test_stream_equals_safetensors(kind: str, dtype: str) -> None:
    manifold: Manifold = resnet() if kind == "resnet" else lenet(kind)
    architecture = manifold.space.architecture(0.4)
    plan = wire.plan(manifold, architecture, dtype)
    tensors = dict(sample(manifold, architecture))
    raw = b"".join(wire.stream(plan, tensors.items()))
    metadata = {"neumeta": json.loads(plan.header[8:])["__metadata__"]["neumeta"]}
    kept = {name: tensor.to(wire.DTYPES[dtype][0]) for name, tensor in tensors.items()}
    assert raw == save(kept, metadata)
    assert len(raw) == plan.length


def test_a_file_tells_its_size_and_graph_at_every_depth() -> None:
    manifold = resnet()
    for depth in ([2, 3, 3], [4, 2, 3]):
        architecture = manifold.space.architecture(0.5, depth)
        about = wire.about(manifold, architecture)
        assert about["format"] == 2  # docs/wire.md: another one would be another file for clients
        assert about["depth"] == depth and about["channels"] == list(architecture.channels)
        graph = unpack(about["graph"])
        deeper = graph.at(tuple(depth))
        mine = manifold.space.graph_of(architecture).folded
        assert sorted(deeper.tensors) == sorted(mine.tensors)
        assert list(graph.groups) == list(manifold.space.groups)


def test_tensors_that_are_not_the_planned_ones_stop_the_stream() -> None:
    manifold = lenet("grid")
    architecture = manifold.space.full
    plan = wire.plan(manifold, architecture, "float32")
    tensors = list(sample(manifold, architecture))
    name, value = tensors[1]
    for wrong, match in (
        (tensors[:-1], "planned but never sampled"),
        ([*tensors, tensors[0]], "where None"),
        (tensors[::-1], "is planned"),
        ([tensors[0], (name, value[1:]), *tensors[2:]], "is planned"),
        ([tensors[0], (name, value * torch.nan), *tensors[2:]], "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            list(wire.stream(plan, wrong))
