"""Running a graph: from any step on, watched, with outputs as the user's module gave them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neumeta.program import Program, output
from tests.support.modules import DEEP, MODULES, flat, images_of, traced

ALL = [*MODULES, *DEEP]


@pytest.mark.parametrize("name", ["resnet", "concatenated", "transposed", "heads", "two outputs"])
@torch.no_grad()
def test_a_frozen_part_that_ran_before_goes_on_the_same(name: str) -> None:
    module, graph = traced(name)
    program, tensors, x = Program(graph, graph.full), module.state_dict(), images_of(name)
    whole = program.run(tensors, x)
    assert type(whole) is type(module(x))  # a tensor, a tuple or a dict
    for first in range(len(graph.nodes) + 1):
        held = program.leading(tensors, x, first)
        needed = {value for node in graph.nodes[first:] for value in node.inputs}
        made = {"input", *(node.name for node in graph.nodes[:first])}
        assert set(held) >= needed & made
        rest = program.run(tensors, held, first=first)
        for a, b in zip(flat(rest), flat(whole), strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_watching_sees_each_step_and_what_it_reads() -> None:
    module, graph = traced("resnet")
    seen: dict[str, Tensor] = {}
    x = images_of("resnet")
    made = Program(graph, graph.full).run(
        module.state_dict(), x, watch=lambda name, value: seen.update({name: value})
    )
    assert list(seen) == [node.name for node in graph.nodes]
    assert torch.equal(seen["conv1"], x)
    assert torch.equal(module.get_submodule("linear")(seen["linear"]), made)


@pytest.mark.parametrize("name", ALL)
def test_values_are_held_no_longer_than_they_are_read(name: str) -> None:
    _, graph = traced(name)
    program = Program(graph, graph.full)
    held, outputs = {"input"}, {value for _, value in graph.outputs}
    for place, step in enumerate(program.steps):
        held.add(step.name)
        assert set(step.inputs) <= held
        held -= set(step.done)
        later = {value for each in program.steps[place + 1 :] for value in each.inputs}
        assert held <= later | outputs
    assert held == outputs


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (torch.tensor([1.0]), None),
        ((torch.tensor([1.0]), torch.tensor([2.0])), 0),
        ({"aux": torch.tensor([2.0]), "out": torch.tensor([1.0])}, "out"),
        ({"first": torch.tensor([1.0]), "second": torch.tensor([2.0])}, "first"),
    ],
)
def test_the_output_that_is_scored(given: object, place: object) -> None:
    assert output(given) is (given if place is None else given[place])  # type: ignore[arg-type, index]


@torch.no_grad()
def test_a_parameter_that_reads_nothing_is_not_watched() -> None:
    module, graph = traced("layer scale")
    seen: list[str] = []
    x = images_of("layer scale")
    Program(graph, graph.full).run(module.state_dict(), x, watch=lambda name, _: seen.append(name))
    assert seen == [node.name for node in graph.nodes if node.op != "parameter"]
    assert len(seen) < len(graph.nodes)
