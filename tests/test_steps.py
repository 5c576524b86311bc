"""What a training step is made of: rates, losses, averages and sizes, against plain references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from neumeta.program import Program
from neumeta.representation.wrappers import Anchored
from neumeta.sample import sample
from neumeta.space import Architecture, Space
from tests.conftest import lenet
from tests.support import runs
from training import data, fit, frozen, recipe, recipe_file, sizes, source
from training.task import TASKS

TASK = TASKS["classification"]


def tiny(**changes: Any) -> recipe.Recipe:
    """A run of a few steps on the digits; the one place that knows how a recipe is built."""
    few: dict[str, Any] = {
        "epochs": 1.0, "batch": 256, "sandwich": False, "distill": "none",
        "reconstruction": 0.0, "regularisation": 0.0,
    }  # fmt: skip
    asked = recipe_file.load("tiny").changed(network={"train": {"epochs": 0}}, fit=few | changes)
    return asked.changed(order={"strategy": "none"})


def fitted(folder: Path, save_every: int = 200, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The manifold after a fit, and the state that the fit left."""
    asked, digits = tiny(**changes), data.load("digits")
    manifold, smoothed = runs.prepared(asked, digits, folder)
    assert fit.fit(manifold, smoothed, digits, TASK, asked, folder, save_every=save_every)
    return manifold, torch.load(folder / "fit.pt", weights_only=True)


def test_one_cycle_rises_by_the_share_asked_then_falls_to_nothing() -> None:
    rates = [source.one_cycle(step, 100, 0.2) for step in range(101)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == 1.0 and rates[60] == pytest.approx(0.5) and rates[100] == 0.0
    assert all(b < a for a, b in zip(rates[20:], rates[21:], strict=False))
    assert source.one_cycle(4, 100, 0.05) == 1.0 and source.one_cycle(0, 1) == 1.0
    assert source.one_cycle(3, 100) == 0.2  # a fifth where nothing is said


def test_the_weight_is_of_the_teacher_and_the_rest_of_the_labels() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 1])
    p, q = logits.softmax(1), teacher.softmax(1)
    hard = -(p[0, 0].log() + p[1, 1].log()) / 2
    soft = (q * (q.log() - p.log())).sum() / 2
    for weight in (0.0, 0.25, 1.0):
        found = source.mixed(TASK, logits, labels, teacher, weight)
        assert float(found) == pytest.approx(float((1 - weight) * hard + weight * soft))
    assert float(source.mixed(TASK, logits, labels, None, 0.9)) == pytest.approx(float(hard))
    assert float(source.mixed(TASK, teacher, labels, teacher, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_manifold_is_the_moving_average_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, torch.Tensor]] = []
    finish = fit._finish

    def recorded(model: torch.nn.Module, *rest: Any) -> bool:
        if not states:
            states.append({n: v.clone() for n, v in model.state_dict().items()})
        late = finish(model, *rest)
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        return late

    monkeypatch.setattr(fit, "_finish", recorded)
    manifold, kept = fitted(tmp_path, batch=64, epochs=0.5, ema=0.5)
    found = manifold.representation.state_dict()
    assert len(states) == kept["step"] + 1 > 8
    for name, value in found.items():
        expected = states[0][name]
        for step, state in enumerate(states[1:]):
            decay = min(0.5, (1 + step) / (10 + step))  # from the ninth step on the first
            expected = decay * expected + (1 - decay) * state[name]
        torch.testing.assert_close(value, expected)
        assert torch.equal(kept["model"][name], states[-1][name])
    assert any(not torch.equal(found[n], states[-1][n]) for n in found)


def test_a_gradient_is_clipped_value_by_value_before_the_step() -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    for clip, kept in ((0.5, [0.5, -0.5, 0.25]), (0.0, [3.0, -4.0, 0.25])):
        model.weight.data.copy_(before)
        model.weight.grad = torch.tensor([[3.0, -4.0, 0.25]])
        optimiser = torch.optim.SGD(model.parameters(), 1.0)
        fit._finish(model, optimiser, tiny(clip=clip), 1, torch.tensor(1.0), "here", 1.0)
        torch.testing.assert_close(before - model.weight.detach(), torch.tensor([kept]))


def test_the_rate_follows_the_cycle_and_vectors_do_not_decay() -> None:
    model = torch.nn.Linear(3, 2)
    groups = fit._optimiser(model, tiny(weight_decay=0.1)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"] == [model.weight] and groups[1]["params"] == [model.bias]
    assert isinstance(fit._optimiser(model, tiny(optimiser="sgd")), torch.optim.SGD)


def test_the_rate_rises_for_the_share_that_is_warm_and_state_is_kept_every_so_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    kept: list[int] = []
    finish, save = fit._finish, fit.states.save

    def recorded(model: Any, optimiser: Any, *rest: Any) -> bool:
        rates.append(optimiser.param_groups[0]["lr"])
        return finish(model, optimiser, *rest)

    def saved(state: Any, path: Path) -> None:
        if path.name == "fit.pt":
            kept.append(state["step"])
        save(state, path)

    monkeypatch.setattr(fit, "_finish", recorded)
    monkeypatch.setattr(fit.states, "save", saved)
    fitted(tmp_path, 4, batch=64, epochs=0.5, warm=0.5, lr=0.01)
    assert rates == pytest.approx([0.01 * source.one_cycle(s, 10, 0.5) for s in range(10)])
    assert rates.index(max(rates)) in (4, 5)
    assert kept == [4, 8, 10]


def test_cells_of_a_stage_cover_it_whatever_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    assert fit.partition(4, 0.0, generator) == [(i / 4, (i + 1) / 4) for i in range(4)]
    assert fit.partition(1, 0.5, generator) == [(0.0, 1.0)]
    moved = []
    for _ in range(300):
        cells = fit.partition(5, 0.4, generator)
        assert cells[0][0] == 0 and cells[-1][1] == 1 and len(cells) == 5
        for (low, high), (after, _) in zip(cells, cells[1:], strict=False):
            assert low < high == after
        moved += [5 * high - i - 1 for i, (_, high) in enumerate(cells[:-1])]
    assert max(map(abs, moved)) <= 0.4 + 1e-6
    assert min(moved) < -0.38 and max(moved) > 0.38 and abs(sum(moved) / len(moved)) < 0.03


def test_shares_of_widths_are_the_smallest_and_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    space = runs.space(tiny(), data.load("digits"))
    generator, full, drawn = torch.Generator().manual_seed(0), space.full, list[Any]()

    def asked_for(_: Space, width: Any, depth: Any = None) -> Architecture:
        drawn.append(width)
        return full

    monkeypatch.setattr(Space, "architecture", asked_for)
    for share, least, most in ((0.0, 0, 0), (0.5, 70, 130), (1.0, 200, 200)):
        for key in ("smallest", "per_group"):
            asked = tiny(**{"per_group": 0.0, key: share})
            drawn.clear()
            for _ in range(200):
                sizes.choose(asked, space, generator)
            smallest = drawn.count(0.25)
            uneven = [width for width in drawn if isinstance(width, list)]
            assert least <= (smallest if key == "smallest" else len(uneven)) <= most
            if key == "per_group":
                assert smallest == 0 and all(len(set(each)) == 3 for each in uneven)
            others = [width for width in drawn if isinstance(width, float) and width != 0.25]
            if others:  # over the whole range, all alike
                assert 0.25 < min(others) < 0.28 and 0.97 < max(others) < 1


def test_what_a_step_makes_is_what_is_sampled() -> None:
    manifold = replace(lenet("grid"), noise=0.0, samples=1)
    for width in (1.0, 0.5, 0.3):
        size = manifold.space.architecture(width)
        found = fit.generated(manifold, size, 0.0, torch.Generator())
        wanted = dict(sample(manifold, size))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name].detach(), value) for name, value in wanted.items())


def test_frozen_features_are_what_the_first_operations_make(tmp_path: Path) -> None:
    digits = data.load("digits")
    asked = tiny(morph=("conv3",), feature_views=3)
    manifold, smoothed = runs.prepared(asked, digits, tmp_path)
    first = frozen.steps(manifold.space)
    assert manifold.space.graph.nodes[first].name == "conv3"
    digits = replace(digits, train_images=digits.train_images[:64], flips=True, pad=1)
    given = (manifold.space, smoothed, first, digits, asked, torch.device("cpu"))
    views = frozen.features(*given)
    assert len(views) == 3
    program = Program(manifold.space.graph, manifold.space.graph.full)
    x = data.to_float(digits.train_images, digits)
    (name,) = views[0]
    assert all(view[name].dtype == torch.float16 for view in views)
    held = program.leading(smoothed, x, first)
    torch.testing.assert_close(views[0][name].float(), held[name], atol=1e-2, rtol=1e-2)
    rest = program.run(smoothed, {name: held[name]}, first=first)
    torch.testing.assert_close(rest, program.run(smoothed, x))
    assert not torch.equal(views[1][name], views[0][name])
    assert not torch.equal(views[2][name], views[1][name])
    again = frozen.features(*given)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(views, again, strict=True))


def test_growth_counts_fully_while_training_and_as_before_afterwards() -> None:
    model = runs.representation("grid", {"anchored": {"reach": 0.5, "growth": 0.25}})
    (anchored,) = [each for each in model.modules() if isinstance(each, Anchored)]
    with pytest.raises(RuntimeError), fit.whole_growth(model):
        assert anchored.growth == 1.0
        raise RuntimeError
    assert anchored.growth == 0.25


def test_reconstruction_is_the_mean_of_relative_errors() -> None:
    made = {
        "a": torch.tensor([1.0, 2.0], requires_grad=True),
        "b": torch.ones(3, requires_grad=True),
    }
    targets = {"a": torch.tensor([2.0, 0.0]), "b": torch.full((3,), 2.0)}
    expected = ((1 + 4) / 4 + 3 / 12) / 2
    assert fit.reconstruction(made, targets).item() == pytest.approx(expected)


def test_a_step_follows_all_of_its_losses_with_the_weights_that_the_recipe_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the losses written out: the full size by labels alone, smaller ones mostly by it."""
    asked = tiny(
        epochs=0.01, batch=64, sandwich=True, distill="inplace", distill_weight=0.3, augment=False,
        full_weight=3.0, reconstruction=0.5, regularisation=0.02, clip=0.0,
    ).changed(representation={"noise": 0.0})  # fmt: skip
    digits = data.load("digits")
    manifold, smoothed = runs.prepared(asked, digits, tmp_path)
    space, model = manifold.space, manifold.representation
    sizes = (space.full, space.architecture(0.5), space.architecture([0.25, 0.5, 1.0]))

    def begun(*_: Any, **__: Any) -> float:
        # Away from the source, where reconstruction would not pull.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return float("inf")

    torch.manual_seed(0)
    monkeypatch.setattr(fit, "initialise", begun)
    gradients = runs.gradients(manifold, smoothed, digits, asked, sizes, tmp_path)
    ((x, y),) = digits.batches(source.epoch_plan(asked.seed, "fit", len(digits), 64, 0, 1), False)
    teacher, loss = torch.empty(0), torch.zeros(())
    for size in sizes:
        weights = fit.generated(manifold, size, 0.0, torch.Generator(), 0.0)
        logits = Program(space.graph_of(size), space.sizes(size)).run(weights, x)
        hard = torch.nn.functional.cross_entropy(logits, y)
        if size == space.full:
            teacher = logits.detach().softmax(1)
            errors = [
                (weights[name] - smoothed[name]).square().sum() / smoothed[name].square().sum()
                for name in weights
            ]
            loss = loss + 3.0 * hard + 0.5 * torch.stack(errors).mean()
        else:
            log = logits.log_softmax(1)
            soft = (teacher * (teacher.log() - log)).sum(1).mean()
            loss = loss + 0.7 * hard + 0.3 * soft
        loss = loss + 0.02 * torch.stack([value.norm() for value in weights.values()]).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
