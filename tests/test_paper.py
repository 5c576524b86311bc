"""Every table of `benchmarks.paper` is made, in tiny budgets; no row is measured twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.paper import __main__ as paper
from benchmarks.paper import (
    averaging,
    continuous,
    depth,
    lead,
    pictures,
    published,
    sheets,
    similarity,
    subject,
)
from benchmarks.paper.bench import Bench, Setting
from benchmarks.paper.table import Results, Rows, Table, markdown, mean_row
from neumeta.fold import fold
from neumeta.program import Program
from training import data, recipe_file, source
from training.networks import lenet, vae
from training.order import cliques
from training.trace import trace

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.paper", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_table_is_made_and_a_second_run_measures_nothing(tmp_path: Path) -> None:
    done = run("all", "--quick", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "docs" / "paper.md").read_text()
    setting = Setting(
        True, None, Path(), Path(), ROOT / "models", tmp_path, Results(tmp_path / "docs/paper")
    )
    for name, make in paper.TABLES.items():
        table = make(Bench(setting))
        assert f"## {name}: {table.title}" in page
        assert list(setting.results.read(name)) == list(table.rows)
    assert "Not measured yet" not in page and "claim" in page
    for figure in ("figure1", "figure2"):
        assert (tmp_path / "docs" / "figures" / f"paper-{figure}.svg").stat().st_size > 1000
    for name in ("section8", "generation"):
        path = tmp_path / "docs" / "figures" / f"paper-{name}.png"
        assert path.stat().st_size > 1000 and f"](figures/paper-{name}.png)" in page
    # The same training stands for the same rows of several tables.
    rows = [setting.results.read("table1")["mSHP"], setting.results.read("table3")["with residual"]]
    assert rows[0] == rows[1]
    for path in (tmp_path / "docs" / "paper").glob("*.json"):
        path.touch()
    again = run("all", "--quick", "--runs", str(tmp_path))
    assert again.returncode == 0 and len(again.stdout.splitlines()) == 1
    assert (tmp_path / "docs" / "paper.md").read_text() == page


def test_a_row_is_made_again_with_seeds_that_it_lacks_and_is_their_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Results(tmp_path / "docs" / "paper")
    asked = ["table3", "--quick", "--runs", str(tmp_path)]
    assert paper.main(asked) == 0
    first = kept.read("table3")["with residual"]
    assert paper.main([*asked, "--seeds", "2"]) == 0
    row = kept.read("table3")["with residual"]
    assert row["seeds"][0] == first and row["seeds"][1]["training"] != first["training"]
    means = [each["mean"] for each in row["seeds"]]
    assert row["mean"] == round(sum(means) / 2, 4) != first["mean"]
    assert row["spread"]["mean"] == round(abs(means[0] - means[1]) / 2**0.5, 4)
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert f"{row['mean']:.2f} ± {row['spread']['mean']:.2f} (91.87)" in page
    # What has been trained is not trained again, with fewer seeds neither.
    capsys.readouterr()
    assert paper.main(asked) == 0
    assert (
        len(capsys.readouterr().out.splitlines()) == 1
        and kept.read("table3")["with residual"] == row
    )


def test_a_time_that_is_up_keeps_what_is_done_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["section2", "table3", "--quick", "--runs", str(tmp_path), "--max-minutes", "1e-9"]
    assert paper.main(asked) == 3
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["code"] == 3
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert "## section2" in page and "## table3" not in page


def test_the_list_names_what_there_is_and_another_name_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert paper.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(paper.TABLES)
    with pytest.raises(SystemExit):
        paper.main(["table9"])
    assert "table9" in capsys.readouterr().err


def test_a_row_shows_the_papers_figure_beside_ours_and_what_is_missing() -> None:
    table = Table(
        "t", "a title", "A head.", ("x", "y"), ("one", "two"), lambda name: {},
        lambda rows: f"All {len(rows)}.", {"one": {"x": 91.87}},
    )  # fmt: skip
    half = markdown(table, {"one": {"x": 90.5, "y": "text"}}, None)
    assert "| one | 90.50 (91.87) | text |" in half
    assert "| two |  |  |" in half and "Not measured yet: two." in half and "All" not in half
    whole = markdown(table, {"one": {"x": 90.5}, "two": {"y": 1200.0}}, Path("figures/f.svg"))
    assert "| two |  | 1,200.00 |" in whole and "All 2." in whole
    assert "![a title](figures/f.svg)" in whole
    assert "| one | 12,345 |" in markdown(table, {"one": {"x": 12345}}, None).replace(
        " (91.87)", ""
    )


def test_a_relu_network_equals_a_piecewise_linear_function_at_and_between_its_bounds() -> None:
    bounds, slopes = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([4.0, -8.0, 2.0])
    net = continuous.piecewise(bounds.double(), slopes.double(), 1.0)
    x = torch.tensor([[0.0], [0.125], [0.25], [0.5], [0.75], [1.0]], dtype=torch.float64)
    assert net(x)[:, 0].tolist() == [1.0, 1.5, 2.0, 0.0, 0.5, 1.0]
    # The sum over segments that the supplement writes is another function.
    written = continuous.as_written(bounds.double(), slopes.double(), 1.0)
    assert (written(x) - net(x)).abs().max() > 1


def test_a_network_of_bicubic_kernels_goes_through_its_values_and_equals_the_spline() -> None:
    values = torch.tensor([[0.0], [1.0], [4.0], [9.0], [16.0], [3.0]], dtype=torch.float64)
    net = continuous.kernel_network(values)
    at = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    assert torch.equal(net(at), values[1:5])
    # Its kernel is exact on quadratics.
    between = torch.tensor([[1.5], [2.25]], dtype=torch.float64)
    assert torch.allclose(net(between), between.square(), atol=1e-12)
    spline = continuous.catmull_rom(values.numpy(), np.array([3.7]))
    with torch.no_grad():
        assert abs(net(torch.tensor([[3.7]], dtype=torch.float64)).item() - spline[0, 0]) < 1e-12


@pytest.mark.parametrize("numbers", [500, 5000, 50_000])
def test_an_mlp_has_as_many_numbers_as_it_is_asked_for(numbers: int) -> None:
    hidden = continuous.units(numbers, 6, 9)
    layers = [(78, hidden), *[(hidden, hidden)] * (continuous.LAYERS - 1), (hidden, 9)]
    held = sum(a * b + b for a, b in layers) + continuous.LAYERS - 1
    assert abs(held / numbers - 1) < 0.1


def test_cka_is_one_for_a_rotation_and_small_for_unrelated_features() -> None:
    draw = torch.Generator().manual_seed(0)
    x, other = torch.randn(200, 4, generator=draw), torch.randn(200, 4, generator=draw)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw))[0]
    assert abs(similarity.cka(x, 3 * x @ turn + 5) - 1) < 1e-6
    assert similarity.cka(x, other) < 0.1


def test_depths_inside_and_outside_the_trained_square_are_told_apart() -> None:
    scores = {(1, 1): 99.0, (3, 3): 98.0, (1, 4): 90.0, (7, 7): 60.0}
    row = depth.summary([{"depth": list(d), "score": s} for d, s in scores.items()])
    assert (row["inside, lowest"], row["inside, mean"], row["(7, 7)"]) == (98.0, 98.5, 60.0)
    assert (row["outside, lowest"], row["outside, mean"]) == (60.0, 75.0)


def test_a_network_that_folding_or_a_new_order_changes_is_seen(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    net = lenet(widths=(4, 4, 4)).eval()
    graph, _ = trace(net, torch.zeros(1, 1, 8, 8))
    tests = {"": data.load("digits")}
    row = published.compared(net, graph, tests, 5)
    assert row["imported"] == row["folded"] == row["permuted"] and row["_change"] < 1e-5
    # Only some sides of an axis in the new order: another network.
    monkeypatch.setattr(
        published, "cliques", lambda g: {axis: sides[:1] for axis, sides in cliques(g).items()}
    )
    assert published.compared(net, graph, tests, 5)["_change"] > 1e-2


@pytest.mark.parametrize("picture", [sheets.masks, sheets.samples])
def test_the_networks_of_a_picture_may_be_trained_when_it_is_drawn(picture: Any) -> None:
    class Subject:
        tests = data.load("digits")

        def networks(self) -> dict[str, Any]:
            assert torch.is_grad_enabled()
            return {}

    assert all(label in ("image", "true mask") for label in picture(Subject()))


def test_codes_are_decoded_as_the_networks_own_decoder_does() -> None:
    torch.manual_seed(0)
    net = vae(latent=3, width=4, hidden=8).eval()
    graph, _ = trace(net, torch.zeros(1, 1, 32, 32))
    weights = fold(graph, source.tensors(net, graph.tensors))
    codes = torch.randn(5, 3)
    program = Program(graph.folded, graph.full)
    assert torch.allclose(sheets.decoded(program, weights, codes), net.decoder(codes), atol=1e-6)


def test_the_claim_is_judged_at_the_unseen_size_and_at_half() -> None:
    judge = pictures.verdict("points", 1.0)

    def told(unseen: float, half: float) -> str:
        rows = {
            "the source network": {"γ = 0": 34.0},
            "individual": {"50 %": 33.0},
            "slimmable": {"75 % (unseen)": 25.0},
            "NeuMeta": {"50 %": half, "75 % (unseen)": unseen},
        }
        return judge(rows)

    assert "30.00 against 25.00 points, 4.00 below the source" in told(30.0, 32.5)
    assert "unseen 75 % holds" in told(30.0, 31.5) and "50 % does not hold" in told(30.0, 31.5)
    assert "unseen 75 % does not hold" in told(24.0, 32.5) and "50 % holds" in told(24.0, 32.5)


def test_only_an_individual_network_is_trained_at_the_unseen_size() -> None:
    asked = recipe_file.load("camvid-unet")
    neumeta = asked.changed(fit=pictures.BUDGET).fit
    slimmable = asked.changed(**subject.nested(subject.TRAINED)).fit
    alone = asked.changed(**subject.nested((0.25,))).fit
    assert neumeta.width == slimmable.width == (0.5, 1.0) and not neumeta.widths
    assert slimmable.widths == (1.0, 0.75, 0.5) and slimmable.smallest == 0
    assert alone.widths == (0.25,) and alone.width == (0.25, 1.0)


def test_a_pixel_without_a_class_is_black_in_a_mask() -> None:
    found = sheets.coloured(torch.tensor([[0, data.NO_LABEL], [10, 3]]))
    assert found.shape == (2, 2, 3) and not found[0, 1].any()
    assert (found[1, 1] * 255).round().tolist() == [128, 64, 128]  # road


def test_half_a_point_between_rows_of_one_seed_decides_nothing() -> None:
    def told(claimed: float, other: float) -> str:
        return lead.best({"claimed": {"mean": claimed}, "other": {"mean": other}}, "claimed")

    assert (
        told(88.0, 87.0) == "The claim holds here: 'claimed' is best, 1.00 points ahead of 'other'."
    )
    assert "does not hold here: 'other' is 1.00 points ahead" in told(87.0, 88.0)
    assert "Undecided here: 'claimed' is 0.25 points behind 'other'" in told(87.0, 87.25)
    assert "Undecided here: 'claimed' is 0.25 points ahead of 'other'" in told(87.25, 87.0)


def test_averaging_is_judged_on_average_and_at_the_unseen_size() -> None:
    unseen = "75 % (unseen)"

    def told(mean: dict[str, float], far: dict[str, float]) -> list[str]:
        names = [f"a = {a}, K = {k}" for a in ("0.5", "0.25") for k in (1, 50)] + ["a = 0, K = 1"]
        rows: Rows = {
            name: {"mean": 80 + mean.get(name, 0), unseen: 70 + far.get(name, 0)} for name in names
        }
        return averaging.judged(rows).split(f" At {unseen} ")

    both = {"a = 0.5, K = 50": 1.0, "a = 0.25, K = 50": 2.0}
    average, far = told({}, both)
    assert "pays is undecided" in average and "+0.00 points (undecided) at a = 0.25." in average
    assert far.startswith("it holds: K = 50 is worth +1.00 points at a = 0.5, +2.00 points at a =")
    average, far = told({name: -value for name, value in both.items()}, {"a = 0, K = 1": -3.0})
    assert "pays does not hold: K = 50 is worth -1.00 points at" in average
    assert far.endswith("instead of none is, at K = 1, worth +3.00 points.")
    assert "pays is undecided" in told({"a = 0.5, K = 50": 1.0, "a = 0.25, K = 50": -1.0}, {})[0]


def test_a_lead_over_several_seeds_decides_if_its_interval_leaves_out_zero() -> None:
    def told(leads: list[float]) -> str:
        seeds = [80.0 + 3 * seed for seed in range(len(leads))]  # which both rows share
        rows = {
            "claimed": mean_row([{"mean": s + by} for s, by in zip(seeds, leads, strict=True)]),
            "other": mean_row([{"mean": s} for s in seeds]),
        }
        return lead.best(rows, "claimed")

    # Student's t of three: 4.30 standard errors, here of 0.1 / sqrt(3).
    assert "holds here: 'claimed' is best, 0.30 points ahead" in told([0.2, 0.3, 0.4])
    assert "Undecided here: 'claimed' is 0.20 points ahead" in told([0.1, 0.2, 0.3])
    assert "less than 3 seeds can tell" in told([0.1, 0.2, 0.3])
    assert "Undecided here: 'claimed' is level with 'other'" in told([0.0, 0.0, 0.0])
    assert "does not hold here: 'other' is 0.30 points ahead" in told([-0.2, -0.3, -0.4])
