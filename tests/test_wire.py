"""The bytes of the wire: known before they are made, and those that safetensors would write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from neumeta import network, onnx, wire
from neumeta.graph import Graph
from neumeta.manifold import Manifold
from neumeta.notation import pack, unpack
from neumeta.sample import sample
from tests.conftest import lenet
from tests.support import modules
from tests.test_checkpoint import resnet

FLOATS = [dtype for dtype in wire.KINDS if dtype != "int8"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["mlp", "grid", "resnet"])
def test_stream_equals_safetensors(kind: str, dtype: str) -> None:
    manifold: Manifold = resnet() if kind == "resnet" else lenet(kind)
    architecture = manifold.space.architecture(0.4)
    plan = wire.plan(manifold, architecture, dtype)
    tensors = dict(sample(manifold, architecture))
    raw = b"".join(wire.stream(plan, tensors.items()))
    metadata = {"neumeta": json.loads(plan.header[8:])["__metadata__"]["neumeta"]}
    kept = {name: tensor.to(wire.KINDS[dtype][0]) for name, tensor in tensors.items()}
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


def reference(tensor: Tensor, axis: int) -> tuple[Any, Any]:
    """int8 numbers and float32 factors, channel by channel, as docs/wire.md says they are."""
    channels = np.moveaxis(tensor.numpy(), axis, 0)
    numbers, factors = np.zeros(channels.shape, np.int8), np.ones(len(channels), np.float32)
    for place, channel in enumerate(channels):
        factor = np.abs(channel).max() / np.float32(127)
        if factor >= np.finfo(np.float32).tiny:
            factors[place] = factor
        for at, value in np.ndenumerate(channel):
            numbers[place][at] = round(float(value / factors[place]))  # Python's: half to even
    return np.moveaxis(numbers, 0, axis), factors


def about_of(graph: Graph, times: int = 1) -> dict[str, Any]:
    """The metadata of a file of this graph, so many times as wide as it is."""
    extents = dict.fromkeys((axis.group, axis.size) for axis in graph.axes.values())
    channels = sum(repeat for _, repeat in graph.input[1])
    return {
        "graph": pack(graph),
        "depth": list(graph.depth),
        "channels": [times * n for group in graph.groups for own, n in extents if own == group],
        "mean": [0.1] * channels,
        "std": [0.4] * channels,
    }


@pytest.mark.parametrize(
    "name", ["depthwise", "grouped", "transposed", "transposed groups", "shared", "layer scale"]
)
def test_int8_weights_are_the_references_and_load_to_what_they_stand_for(
    name: str, tmp_path: Path
) -> None:
    graph = modules.traced(name)[1].folded
    sizes, about = {axis: 4 * size for axis, size in graph.full.items()}, about_of(graph, 4)
    tensors = modules.drawn(graph, sizes)
    plan = wire.plan_graph(graph, sizes, about, "int8")
    raw = b"".join(wire.stream(plan, sorted(tensors.items())))
    assert len(raw) == plan.length and raw.startswith(plan.header)
    found, wanted = load(raw), dict(tensors)
    weights = {
        node.tensors["weight"]: int(node.op == "conv_transpose")
        for node in graph.nodes
        if node.op in ("conv", "conv_transpose", "linear")
    }
    small = {n for n in weights if 3 * tensors[n].numel() <= 4 * tensors[n].shape[weights[n]] + 256}
    assert set(plan.scales) == set(weights) - small != set()
    for each in plan.scales:
        numbers, factors = reference(tensors[each], weights[each])
        around = [-1 if place == weights[each] else 1 for place in range(numbers.ndim)]
        scale = torch.from_numpy(factors.reshape(around))
        assert torch.equal(found.pop(each), torch.from_numpy(numbers))
        assert torch.equal(found.pop(f"{each}_scale"), scale)
        wanted[each] = torch.from_numpy(numbers).float() * scale
        # Half a factor, and as much as a float32 quotient and product are off.
        assert bool(((wanted[each] - tensors[each]).abs() <= 0.50001 * scale).all())
    assert found.keys() == tensors.keys() - set(plan.scales)
    assert all(torch.equal(value, tensors[each]) for each, value in found.items())
    (tmp_path / "n").write_bytes(raw)
    net = network.load(tmp_path / "n")
    state = net.state_dict()
    assert all(torch.equal(state[each], value) for each, value in wanted.items())
    plain = network.Network(graph, sizes, wanted)
    plain.normalise(about["mean"], about["std"])
    x = modules.images_of(name)
    with torch.no_grad():
        assert modules.error(net(x), plain(x)) <= 1e-6


def test_int8_rounds_half_to_even_and_has_no_factor_of_zero() -> None:
    rows = torch.tensor(
        [
            [127, 0.5, 1.5, 2.5, -0.5, -126.5],
            [0, -0.0, 0, 0, 0, 0],
            [1e-40, -1e-38, 0, 0, 0, 0],
            [-3e38, 3e38, 1, 0, 0, 0],
            [1.5e-36, 0, 0, 0, 0, 0],
        ]
    )
    for turned in (False, True):
        numbers, factors = wire.quantized("w", rows.T if turned else rows, int(turned))
        assert factors.shape == ((1, 5) if turned else (5, 1)) and bool((factors > 0).all())
        assert (numbers.T if turned else numbers).tolist() == [
            [127, 0, 2, 2, 0, -126],
            [0] * 6,
            [0] * 6,
            [-127, 127, 0, 0, 0, 0],
            [127, 0, 0, 0, 0, 0],
        ]
        assert factors.flatten()[:3].tolist() == [1, 1, 1]
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="conv.weight: sampled weights are not finite"):
            wire.quantized("conv.weight", rows * wrong, 0)


@pytest.mark.parametrize("file_format", wire.FORMATS)
def test_int8_weights_are_sent_as_they_are_sampled(file_format: str) -> None:
    """Before the next one is: what waits for the end is a small part."""
    manifold = lenet("grid")
    plan = wire.plan(manifold, manifold.space.full, "int8", file_format)
    tensors = dict(sample(manifold, manifold.space.full))
    asked: list[str] = []

    def watched() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            asked.append(name)
            yield name, tensor

    sent, chunks = 0, wire.stream(plan, watched())
    assert next(chunks) == plan.header and not asked
    for name in plan.scales:
        chunk = next(chunks)
        assert asked[-1] == name
        assert chunk.endswith(wire.quantized(name, tensors[name], 0)[0].numpy().tobytes())
        sent += len(chunk)
    late = b"".join(chunks)
    assert len(plan.header) + sent + len(late) == plan.length and len(late) < 0.05 * sent
    with pytest.raises(ValueError, match="planned but never sampled"):
        list(wire.stream(plan, list(tensors.items())[:-1]))


def test_an_int8_file_has_its_floats_where_any_reader_can_have_them() -> None:
    """Behind the int8 ones, without holes, each at a multiple of four bytes, at any width."""
    manifold = lenet()
    for width in (0.26, 0.4, 0.7, 1.0):
        raw = wire.plan(manifold, manifold.space.architecture(width), "int8").header
        header, start, end = json.loads(raw[8:]), len(raw), 0
        assert int.from_bytes(raw[:8], "little") == start - 8
        del header["__metadata__"]
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            assert first == end and (entry["dtype"] == "I8" or (start + first) % 4 == 0), name
            end = last
        kinds = [entry["dtype"] for entry in header.values()]
        assert kinds == sorted(kinds, reverse=True) and {"I8", "F32"} == set(kinds)


def test_int8_spares_what_would_not_be_smaller_and_takes_no_name_twice() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Conv2d(3, 8, 3)
            self.a.weight_scale = torch.nn.Parameter(torch.ones(8, 1, 1))
            self.b = torch.nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.a.weight_scale).mean((2, 3))  # type: ignore[no-any-return]

    graph = modules.trace(Small().eval(), torch.zeros(1, 3, 5, 5))[0].folded
    plan = wire.plan_graph(graph, graph.full, about_of(graph), "int8")
    assert {name: each.name for name, each in plan.scales.items()} == {
        "a.weight": "a.weight_scale_"
    }
    tensors = modules.drawn(graph, graph.full)
    found = load(b"".join(wire.stream(plan, sorted(tensors.items()))))
    assert torch.equal(found["a.weight_scale"], tensors["a.weight_scale"])
    assert found["a.weight_scale_"].shape == (8, 1, 1, 1)
    assert torch.equal(found["b.weight"], tensors["b.weight"])
    assert onnx.plan(graph, graph.full, about_of(graph), "int8").scales == plan.scales
