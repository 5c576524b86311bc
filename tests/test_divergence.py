"""Training that diverges stops with one message, and leaves nothing that would go on from there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import runs
from tests.support.runs import prepared
from training import basis, cli, data, divergence, fit, pipeline, recipe, recipe_file, source
from training.divergence import Diverged
from training.task import TASKS

TASK = TASKS["classification"]

SMALL = {"layers": 3, "hidden": 16, "num_freq": 4}
TINY = recipe_file.load("tiny").changed(
    network={"train": {"epochs": 1, "lr": 0.05, "batch": 256}},
    fit={"epochs": 2.0, "batch": 256, "lr": 1e-3, "sandwich": False, "distill": "none",
         "reconstruction": 0.0},
    evaluate={"widths": (1.0,)},
)  # fmt: skip


def written(folder: Path, asked: recipe.Recipe) -> Path:
    """The recipe's file."""
    path = folder / "tiny.toml"
    lines = []
    values = asked.model_dump(mode="json", exclude_none=True).items()
    for name, section in sorted(values, key=lambda pair: isinstance(pair[1], dict)):
        held = section if isinstance(section, dict) else {"": section}
        if isinstance(section, dict):
            lines.append(f"[{name}]")
        lines += [f"{key or name} = {toml(value)}" for key, value in held.items()]
    path.write_text("\n".join(lines))
    return path


def toml(value: Any) -> str:
    """One value as TOML spells it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fit": {"lr": 1e30}}, r"fit, .*step \d+ of \d+.*learning rate \S*e\+.*try a lower fit.lr"),
        ({"network": {"train": {"lr": 1e9, "epochs": 3}}},
         r"source, step \d+ of \d+, learning rate \S*e\+0.*a lower network.train.lr"),
        ({"representation": {"kind": "mlp", "options": SMALL},
          "fit": {"regression_steps": 20, "regression_lr": 1e30}},
         r"regression step \d+ of 20, learning rate \S*e\+.*a lower fit.regression_lr"),
    ],
    ids=["fit", "source", "regression"],
)  # fmt: skip
def test_a_rate_that_is_too_high_is_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    run = tmp_path / "run"
    assert cli.main([str(written(tmp_path, TINY.changed(**changes))), "--folder", str(run)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, last), last
    assert not (run / "manifold.safetensors").exists()
    assert not (run / ("source.safetensors" if "network" in changes else "fit.pt")).exists()


def test_the_last_good_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TINY.changed(fit={"epochs": 4.0})
    digits = data.load("digits")
    manifold, smoothed = prepared(asked, digits, tmp_path)
    real = source.mixed

    def broken(*given: Any) -> torch.Tensor:
        calls.append(1)
        return real(*given) * (math.nan if len(calls) == 6 else 1.0)

    calls: list[int] = []
    monkeypatch.setattr(fit, "mixed", broken)
    with pytest.raises(Diverged, match="step 6 of"):
        fit.fit(manifold, smoothed, digits, TASK, asked, tmp_path, save_every=2)
    kept = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert kept["step"] == 4 and all(t.isfinite().all() for t in kept["model"].values())
    # The step that diverged changed nothing.
    assert all(p.isfinite().all() for p in manifold.representation.parameters())


def test_weights_that_overflow_in_the_last_step_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = TINY.changed(fit={"epochs": 0.01})
    digits = data.load("digits")
    manifold, smoothed = prepared(asked, digits, tmp_path)
    first = next(manifold.representation.parameters()).data
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: first.fill_(math.inf))
    with pytest.raises(Diverged, match=r"after step 1 of 1: .*values are not finite"):
        fit.fit(manifold, smoothed, digits, TASK, asked, tmp_path)
    assert not (tmp_path / "fit.pt").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_source_that_is_not_finite_is_refused_by_tensor(tmp_path: Path, bad: float) -> None:
    asked = TINY
    digits = data.load("digits")
    manifold, smoothed = prepared(asked, digits, tmp_path)
    net = runs.source(asked, digits, tmp_path)
    graph = basis.traced(asked, digits, net).graph
    with torch.no_grad():
        smoothed["conv1.bias"][0] = bad
        net.get_parameter("conv2.weight")[0, 0, 0, 0] = bad
    with pytest.raises(Diverged, match="source: conv2.weight: 1 of .* not finite"):
        source.train(net, digits, TASK, epochs=1, lr=0.1)
    with pytest.raises(Diverged, match="source: conv2.weight: .* not finite"):
        pipeline.prepare(asked, digits, graph, net)
    with pytest.raises(Diverged, match="source: conv1.bias: .* not finite"):
        fit.fit(manifold, smoothed, digits, TASK, asked, tmp_path)


def test_a_broken_state_is_not_resumed(tmp_path: Path) -> None:
    asked = TINY
    digits = data.load("digits")
    manifold, smoothed = prepared(asked, digits, tmp_path)
    fit.fit(manifold, smoothed, digits, TASK, asked, tmp_path)
    kept = torch.load(tmp_path / "fit.pt", weights_only=True)
    name = next(iter(kept["average"]))
    kept["average"][name].view(-1)[0] = math.inf
    torch.save(kept, tmp_path / "fit.pt")
    with pytest.raises(Diverged, match=rf"fit.pt: {name}: 1 of"):
        fit.fit(manifold, smoothed, digits, TASK, asked, tmp_path, resume=True)


def test_the_norm_is_of_all_gradients_together() -> None:
    one, two, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    (one * torch.tensor([3.0, 0.0]) + two * torch.tensor([0.0, 4.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert float(divergence.gradient_norm([one, two, unused])) == 5.0
    for loss, norm in ((math.inf, 1.0), (2.0, math.nan)):
        told = (
            rf"here, learning rate 0.5: .*\(loss {loss:.3g}, gradient norm {norm:.3g}\); try that"
        )
        with pytest.raises(Diverged, match=told):
            divergence.check_step("here", 0.5, torch.tensor(loss), torch.tensor(norm), "that")
    divergence.check_step("here", 0.5, torch.tensor(1.0), torch.tensor(1.0), "that")


def test_the_first_tensor_that_is_not_finite_is_named_with_how_much_of_it_is_not() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([1.0, math.nan, math.inf, 2.0])
    divergence.check_tensors("here", {"a": good, "count": torch.tensor(3)})
    with pytest.raises(Diverged, match="^here: b: 2 of 4 values are not finite$"):
        divergence.check_tensors("here", {"a": good, "b": bad, "c": bad[1:2]})
