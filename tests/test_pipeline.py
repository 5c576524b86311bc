"""A run as a person starts it: what it refuses before any work, what it keeps, how it ends."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neumeta import checkpoint
from neumeta.manifold import Manifold
from neumeta.representation import Expanded
from neumeta.sample import sample
from tests.support.images import classes, encoded, pixels, write
from training import (
    basis,
    binding,
    charts,
    cli,
    data,
    fit,
    given,
    networks,
    pipeline,
    recipe,
    recipe_file,
    source,
    statistics,
)
from training.copied import Copied
from training.sizes import choose
from training.task import TASKS

ROOT = Path(__file__).parent.parent
SMALL = """
title = "small"
[network]
network = "lenet"
train = { epochs = 1, lr = 0.1, batch = 256 }
[data]
name = "digits"
[representation]
kind = "grid"
noise = 0.0
samples = 1
[fit]
width = [0.25, 1.0]
epochs = 1
batch = 512
lr = 1e-2
[evaluate]
widths = [1.0]
"""
Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run; for `run`, which copies it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.toml").write_text(SMALL)
    assert cli.main([str(folder / "small.toml"), "--folder", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "place"))


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def main(*more: str, text: str = SMALL, folder: str = "run") -> tuple[int, list[str]]:
        """The exit code, and the lines that the command said on stderr, progress left out."""
        (place / "small.toml").write_text(text)
        capsys.readouterr()
        code = cli.main([str(place / "small.toml"), "--folder", str(place / folder), *more])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return code, [line for line in said.splitlines() if line.startswith("neumeta-train:")]

    return main


def test_a_finished_run_is_evaluated_again_by_another_title_and_other_sizes(
    place: Path, run: Run
) -> None:
    before = load_file(place / "run" / "manifold.safetensors")
    text = SMALL.replace('"small"', '"renamed"').replace("widths = [1.0]", "widths = [0.5, 0.3]")
    assert run("--resume", text=text.replace("samples = 1", "samples = 2")) == (0, [])
    manifold = checkpoint.read(place / "run" / "manifold.safetensors")
    assert manifold.about["title"] == "renamed" and manifold.samples == 2
    assert manifold.about["source"]["kind"] == "train"
    assert [row["width"] for row in manifold.about["evaluation"]] == [0.5, 0.3]
    assert manifold.contract.classes == tuple("0123456789")
    after = load_file(place / "run" / "manifold.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("lr = 1e-2", "lr = 2e-2", "fit.lr = 0.01, and now it is 0.02"),
        ("lr = 0.1", "lr = 0.2", "network.train.lr = 0.1, and now it is 0.2"),
        ('title = "small"', "seed = 3\ntitle = 'x'", "seed = 0, and now it is 3"),
        ("noise = 0.0", "noise = 0.1", "representation.noise = 0.0, and now it is 0.1"),
    ],
)
def test_a_run_is_bound_to_what_its_results_depend_on(
    run: Run, place: Path, old: str, new: str, told: str
) -> None:
    before = (place / "run" / "recipe.json").read_text()
    code, (line,) = run("--resume", text=SMALL.replace(old, new))
    assert code == 2 and told in line and str(place / "run") in line
    assert (place / "run" / "recipe.json").read_text() == before


def test_another_seed_is_the_run_of_a_recipe_that_says_so(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert cli.main(["small.toml", "--seed", "3"]) == 0
    made = checkpoint.read(place / "runs" / "small-seed-3" / "manifold.safetensors")
    assert made.about["recipe"]["seed"] == 3 and made.about["recipe"]["name"] == "small-seed-3"
    assert run(text=f"seed = 3\n{SMALL}", folder="written") == (0, [])
    ours, theirs, first = (
        load_file(place / folder / "manifold.safetensors")
        for folder in ("runs/small-seed-3", "written", "run")
    )
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert any(not torch.equal(ours[name], value) for name, value in first.items())


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", str(2**63), "9" * 5000])
def test_a_seed_is_a_whole_number(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tiny", "--seed", seed])
    said = capsys.readouterr().err
    assert f"--seed: {seed[:30]} is not a whole number from 0 to 2^63 - 1" in said


def test_a_run_that_was_begun_before_a_key_was_made_has_its_default(run: Run, place: Path) -> None:
    path = place / "run" / "recipe.json"
    told = json.loads(path.read_text())
    del told["recipe"]["fit"]["bfloat16"], told["depends"]["fit"]["fit.bfloat16"]
    path.write_text(json.dumps(told))
    code, (line,) = run("--resume", text=SMALL.replace("lr = 1e-2", "lr = 1e-2\nbfloat16 = true"))
    assert code == 2 and "fit.bfloat16 = false, and now it is true" in line
    assert run("--resume") == (0, [])


def test_other_images_may_not_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    images = digits.train_images.clone()
    images[7, 0, 3, 3] ^= 1
    other = replace(digits, train_images=images)
    monkeypatch.setattr(basis, "dataset", lambda asked, root: other)
    code, (line,) = run("--resume")
    assert code == 2 and "data.sha256" in line and other.digest() in line


def test_a_run_is_bound_to_the_weights_that_it_began_with(run: Run, place: Path) -> None:
    def published(seed: int) -> None:
        torch.manual_seed(seed)
        torch.save(networks.lenet().state_dict(), place / "w.pt")

    text = SMALL.replace("train = { epochs = 1, lr = 0.1, batch = 256 }", 'weights = "w.pt"')
    text = text.replace("batch = 512", "batch = 32")
    brief = ("--max-minutes", "1e-9")  # one step of the fit's forty
    published(0)
    assert run(*brief, text=text, folder="new")[0] == 3
    assert run(*brief, "--resume", text=text, folder="new")[0] == 3
    published(1)
    code, (line,) = run(*brief, "--resume", text=text, folder="new")
    assert code == 2 and "network.weights_sha256" in line and str(place / "new") in line
    # A file that is gone is no obstacle, and what it was is not forgotten.
    (place / "w.pt").unlink()
    assert run(*brief, "--resume", text=text, folder="new")[0] == 3
    published(1)
    assert run(*brief, "--resume", text=text, folder="new")[0] == 2
    published(0)
    assert run(*brief, "--resume", text=text, folder="new")[0] == 3
    # A run of 0.2.0, which wrote no digest down, goes on and has one from then on.
    written = json.loads((place / "new" / "recipe.json").read_text())
    del written["depends"]["source"]["network.weights_sha256"]
    (place / "new" / "recipe.json").write_text(json.dumps(written))
    assert run(*brief, "--resume", text=text, folder="new")[0] == 3
    published(1)
    assert run(*brief, "--resume", text=text, folder="new")[0] == 2


def test_a_module_that_is_given_is_bound_by_its_own_weights(place: Path) -> None:
    net = networks.lenet()
    told = {"network": {"network": "python:LeNet"}, "data": {"name": "digits"}, "name": "x"}
    asked = recipe.parse(told | {"title": "x", "fit": {"width": [0.5, 1.0]}}, "morph")
    before = source.weights_digest(asked, Path(), net)
    assert source.weights_digest(asked, Path(), copy.deepcopy(net)) == before is not None
    next(net.parameters()).data[0] += 1e-3
    after = source.weights_digest(asked, Path(), net)
    loaded, folder = data.load("digits"), place / "given"
    binding.begin(asked, loaded, before, folder, resume=False)
    (folder / "source.safetensors").write_bytes(b"")
    binding.begin(asked, loaded, before, folder, resume=True)
    with pytest.raises(ValueError, match="weights_sha256"):
        binding.begin(asked, loaded, after, folder, resume=True)


def test_a_stage_that_has_not_begun_binds_to_nothing(run: Run, place: Path) -> None:
    (place / "run" / "fit.pt").unlink()
    assert run("--resume", text=SMALL.replace("lr = 1e-2", "lr = 2e-2")) == (0, [])
    held = json.loads((place / "run" / "recipe.json").read_text())
    assert held["depends"]["fit"]["fit.lr"] == 0.02


AGAIN = (
    SMALL.replace("train = { epochs = 1, lr = 0.1, batch = 256 }\n", "")
    .replace("[fit]", '[fit]\nstart = "run/manifold.safetensors"')
    .replace("lr = 1e-2", "lr = 1e-12\nweight_decay = 0.0")
)


def of_the_first_run(place: Path, folder: str) -> tuple[Manifold, Manifold]:
    """The first run's manifold, and that of the run in `folder`, whose source it stands for."""
    before, after = (
        checkpoint.read(place / each / "manifold.safetensors") for each in ("run", folder)
    )
    assert after.about["permutation"] == before.about["permutation"]
    (row,) = before.about["evaluation"]
    assert after.about["source"] == {
        "kind": "manifold",
        "file": "run/manifold.safetensors",
        "score": row["score"],
        "metric": "accuracy",
    }
    assert not (place / folder / "source.safetensors").exists()
    return before, after


def refused(run: Run, place: Path, text: str, told: str) -> None:
    """A run of this recipe is not begun, and one line of why matches `told`."""
    code, lines = run(text=text, folder="new")
    assert code == 2 and any(re.search(told, line) for line in lines), lines
    assert not (place / "new").exists()


def test_a_run_goes_on_from_a_manifold_in_place_of_a_source(run: Run, place: Path) -> None:
    assert run(text=AGAIN, folder="again") == (0, [])
    before, after = of_the_first_run(place, "again")
    old, new = (dict(sample(each, each.space.architecture(0.5))) for each in (before, after))
    for name, value in old.items():  # at this learning rate nothing moves
        torch.testing.assert_close(new[name], value, atol=1e-6, rtol=0)
    # Another manifold of that name is another beginning.
    shutil.copy(place / "again" / "manifold.safetensors", place / "run" / "manifold.safetensors")
    code, (line,) = run("--resume", text=AGAIN, folder="again")
    assert code == 2 and "network.weights_sha256" in line


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("run/manifold", "run/nowhere", "fit.start: .*nowhere.* neither in "),
        ("run/manifold.safetensors", "small.toml", "fit.start: .*small.toml"),
        ('"lenet"', '"resnet20"', "network.network: .*another network"),
        ('kind = "grid"', 'kind = "integral"', "fit.start|representation|another network"),
        ("samples = 1", "samples = 1\ncorrected = {}", "representation: .*'corrected'.* has "),
    ],
)
def test_a_manifold_that_does_not_fit_is_no_start(
    run: Run, place: Path, old: str, new: str, told: str
) -> None:
    refused(run, place, AGAIN.replace(old, new), told)


COPY = (
    AGAIN.replace('start = "run', 'copied = "run')
    .replace('kind = "grid"', 'kind = "mlp"')
    .replace(
        "samples = 1\n",
        "samples = 1\noptions = { layers = 2, hidden = 16, num_freq = 4, nested = true }\n",
    )
    .replace("epochs = 1\n", "folded = false\nregression_steps = 4\nepochs = 1\n")
)


def test_a_run_copies_a_manifold_of_another_representation(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = ("--max-minutes", "1e-9")
    assert run(*brief, text=COPY, folder="copy")[0] == 3
    assert (place / "copy" / "regression.pt").exists()
    code, (line,) = run("--resume", text=COPY.replace("steps = 4", "steps = 5"), folder="copy")
    assert code == 2 and "fit.regression_steps = 4, and now it is 5" in line
    asked: list[Any] = []
    begin = fit.initialise

    def begun(manifold: Manifold, *rest: Any, **more: Any) -> float | None:
        asked.append(rest[4])
        return begin(manifold, *rest, **more)

    monkeypatch.setattr(fit, "initialise", begun)
    assert run("--resume", text=COPY, folder="copy") == (0, [])
    (copied,) = asked
    assert isinstance(copied, Copied) and copied.manifold.kind == "grid"
    before, after = of_the_first_run(place, "copy")
    assert after.kind == "mlp" and after.options["nested"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("run/manifold", "run/nowhere", "fit.copied: .*nowhere.* neither in "),
        ('"lenet"', '"resnet20"', "network.network: .*another network"),
        ("width = [0.25, 1.0]", "width = [0.2, 1.0]", r"fit.width: .*trained on 0.25 to 1"),
        ("folded = false", 'folded = false\nstart = "x"', "fit.start: .*beside fit.copied"),
        ("regression_steps = 4", "regression_steps = 0", "fit.regression_steps: 0"),
        ("samples = 1", "samples = 1\ncentred = {}", "representation.centred: .*fit.copied"),
        ('kind = "mlp"', 'kind = "grid"', "representation.kind: 'grid'.*fit.copied"),
    ],
)
def test_a_manifold_that_does_not_fit_is_not_copied(
    run: Run, place: Path, old: str, new: str, told: str
) -> None:
    refused(run, place, COPY.replace(old, new), told)


def noise() -> data.Dataset:
    """Forty images of random pixels in three channels, of ten classes."""
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    labels, classes = torch.arange(40) % 10, tuple("abcdefghij")
    half = [0.5, 0.5, 0.5]
    return data.Dataset("x", images, labels, images, labels, classes, half, half, False, 0)


def test_of_a_manifold_of_many_depths_the_sources_own_is_copied(tmp_path: Path) -> None:
    """And a recipe that folds batch norms away is told so."""
    torch.manual_seed(0)
    net = networks.resnet_cifar((2, 2, 2), 10, (4, 6, 8))
    loaded = noise()
    grid: dict[str, Any] = {
        "name": "x",
        "title": "x",
        "network": {"network": "python:ResNet"},
        "data": {"path": "x"},
        "fit": {"width": [0.5, 1.0], "blocks": [1, 3], "epochs": 0.1, "batch": 20},
    }
    first = recipe.parse(grid, "morph")
    made = pipeline.run(first, loaded, tmp_path, tmp_path / "a", tmp_path / "m", module=net)
    assert made is not None
    copy = {
        **grid,
        "representation": {
            "kind": "mlp",
            "options": {"layers": 2, "hidden": 8, "num_freq": 3, "nested": True},
        },
        "fit": {
            "width": [0.5, 1.0],
            "copied": "m",
            "regression_steps": 2,
            "epochs": 0.1,
            "batch": 20,
            "folded": False,
        },
    }
    asked = recipe.parse(copy, "morph")
    found = basis.check(asked, loaded, tmp_path, tmp_path / "b", net)
    covered = basis.space(asked, found.graph)
    manifold, smoothed, model = given.copied(asked, loaded, covered, tmp_path)
    assert not covered.graph.stages and model.space.blocks == (1, 3)
    example = Copied(model, covered, smoothed).at(covered.architecture(0.5))
    theirs = statistics.raw(model, model.space.architecture(0.5))
    linear = "linear.weight"
    assert example.keys() == theirs.keys() and torch.equal(example[linear], theirs[linear])
    with pytest.raises(ValueError, match="fit.copied: 'm', and no manifold was given"):
        fit.fit(manifold, smoothed, loaded, TASKS["classification"], asked, tmp_path / "b")
    with pytest.raises(recipe.BadRecipe, match="fit.folded: True .* with its batch norms"):
        folded = asked.changed(fit={"folded": True})
        basis.check(folded, loaded, tmp_path, tmp_path / "b", net)
    with pytest.raises(recipe.BadRecipe, match=r"fit.blocks: \[1, 4\] .*trained on 1 to 3"):
        deeper = asked.changed(fit={"blocks": (1, 4)})
        basis.check(deeper, loaded, tmp_path, tmp_path / "b", net)


def test_a_chart_that_has_few_blocks_of_one_stage_goes_on_with_no_more_of_it(
    tmp_path: Path,
) -> None:
    """And a recipe that asks for more is told so."""
    torch.manual_seed(0)
    net = networks.resnet_cifar((3, 3, 3), 10, (4, 6, 8))
    loaded = noise()
    common: dict[str, Any] = {
        "name": "x",
        "title": "x",
        "network": {"network": "python:ResNet"},
        "data": {"path": "x"},
        "representation": {
            "kind": "grid",
            "noise": 0.0,
            "samples": 1,
            "anchored": {"reach": 0.1},
        },
    }
    sizes = {"width": [0.5, 1.0], "blocks": [1, 3]}
    base = recipe.parse({**common, "fit": {**sizes, "epochs": 0.1, "batch": 20}}, "morph")
    assert pipeline.run(base, loaded, tmp_path, tmp_path / "a", tmp_path / "m", module=net)

    def joined(first: dict[str, Any]) -> Manifold:
        rest = {"file": "m", "least": 0.5, "blocks": 1}
        asked = recipe.parse(
            {**common, "fit": sizes, "charts": [{"least": 0.5, "blocks": 1, **first}, rest]},
            "morph",
        )
        covered = basis.space(asked, checkpoint.read(tmp_path / "m").space.graph)
        return given.joined(asked, loaded, covered, tmp_path)

    both = joined({"file": "m", "most_blocks": [3, 2, 1]})
    assert both.about["charts"][0]["most_blocks"] == (3, 2, 1)
    checkpoint.write(
        replace(both, statistics=checkpoint.read(tmp_path / "m").statistics), tmp_path / "b"
    )
    taken = {"file": "b", "chart": 0}
    joined({**taken, "most_blocks": [2, 2, 1]})
    for most in (3, [3, 2, 2]):
        with pytest.raises(recipe.BadRecipe, match=r"charts\[0\].most_blocks: .*; 3, 2, 1 or less"):
            joined({**taken, "most_blocks": most})

    # A chart of one narrow group has no more of that group, and all of the others.
    groups = both.space.groups
    narrow = [1.0] * (len(groups) - 1) + [0.75]
    some = joined({"file": "m", "most": narrow, "steps": 55})
    held = [value for value in some.representation.parts.parameters() if value.dtype == torch.int8]
    assert {int(value.abs().max()) for value in held} == {55, 127}  # of it, and of the other
    checkpoint.write(
        replace(some, statistics=checkpoint.read(tmp_path / "m").statistics), tmp_path / "n"
    )
    with pytest.raises(recipe.BadRecipe, match=r"charts\[0\].most: .*; 1, .*, 0.75 or less"):
        joined({"file": "n", "chart": 0, "most": [*narrow[:-1], 0.8]})
    fit = {**sizes, "start": "n", "chart": 0, "batch": 20}
    told = f"chart 0 of .* has no channels of {groups[-1]} beyond a width of 0.75"
    for most, key in (([], "width"), ([0.75, *narrow[1:-1], 1.0], "most"), (narrow, "")):
        asked = recipe.parse({**common, "fit": {**fit, "most": most}}, "morph")
        wrong = pytest.raises(recipe.BadRecipe, match=f"fit.{key}: .*; {told}")
        with wrong if key else nullcontext():
            basis.check(asked, loaded, tmp_path, tmp_path / "d", net)

    def further(**fit: Any) -> set[tuple[int, ...]]:
        told = {**sizes, "start": "b", "chart": 0, "batch": 20, **fit}
        asked = recipe.parse({**common, "fit": told}, "morph")
        found = basis.check(asked, loaded, tmp_path, tmp_path / "c", net)
        covered, generator = basis.space(asked, found.graph), torch.Generator().manual_seed(0)
        drawn = [size for _ in range(50) for size in choose(asked, covered, generator)]
        return {size.depth for size in drawn}

    # Of what is trained, no stage has more blocks than the chart.
    assert further(blocks=[1, 2], shallow=[2]) == {(2, 2, 1)}
    assert further(blocks=[1, 2], shallow=[2, 2]) == {(2, 2, 1)}
    assert further(blocks=[1, 1]) == {(1, 1, 1)}
    assert further(blocks=[1, 1], sandwich=True, full_weight=0.0) == {(1, 1, 1)}
    some = further(blocks=[1, 2], shallow=[2], per_depth=1.0)
    assert some == {(1, 1, 1), (1, 2, 1), (2, 1, 1), (2, 2, 1)}
    for wrong, allowed in (
        ({"blocks": [1, 2]}, "fit.blocks: .*; chart 0 of .* has no more than 1 blocks in stage 2"),
        ({"blocks": [1, 2], "shallow": True}, "no more than 1 blocks in stage 2"),
        ({"blocks": [1, 3], "shallow": [2]}, "no more than 2 blocks in stage 1"),
        (
            {"blocks": [1, 2], "shallow": [2], "sandwich": True, "full_weight": 0.0},
            "no more than 1 blocks in stage 2",
        ),
        ({"blocks": [1, 2], "shallow": [1, 2]}, "no more than 1 blocks in stage 2"),
        ({"blocks": [1, 2], "shallow": [2, 3]}, "fit.shallow: .*; of stages 0 to 2"),
    ):
        with pytest.raises(recipe.BadRecipe, match=allowed):
            further(**wrong)


def test_a_manifold_goes_on_expanded_if_it_was_not_and_only_so_if_it_was(place: Path) -> None:
    def again(text: str) -> Manifold:
        (place / "again.toml").write_text(text)
        asked, digits = recipe_file.load(str(place / "again.toml")), data.load("digits")
        found = basis.check(asked, digits, place, place / "again")
        return given.begun(asked, digits, basis.space(asked, found.graph), place)[0]

    expanded = AGAIN.replace("samples = 1", "samples = 1\nexpanded = {}")
    kept = place / "run" / "manifold.safetensors"
    before, begun = checkpoint.read(kept), again(expanded)
    assert isinstance(begun.representation, Expanded) and begun.options == {"expanded": {}}
    size = before.space.architecture(0.5)
    old, new = (dict(sample(each, size)) for each in (before, begun))
    assert all(torch.equal(new[name], value) for name, value in old.items())
    # Now one that is: its terms are taken too, and a recipe without them has no place for them.
    for value in begun.representation.terms.parameters():
        value.data.fill_(0.1)
    checkpoint.write(begun, kept)
    new, taken = (dict(sample(each, size)) for each in (begun, again(expanded)))
    assert all(torch.equal(taken[name], value) for name, value in new.items())
    assert not torch.equal(new["conv2.weight"], old["conv2.weight"])
    more = again(expanded.replace("expanded = {}", "expanded = { orders = 2 }"))
    same = dict(sample(more, size))
    assert all(torch.equal(same[name], value) for name, value in new.items())
    assert not any(value.any() for value in more.representation.terms[1].parameters())
    with pytest.raises(recipe.BadRecipe, match="representation: .*'expanded'"):
        again(AGAIN)


CHARTS = (
    SMALL.replace("train = { epochs = 1, lr = 0.1, batch = 256 }\n", "")
    .replace('[representation]\nkind = "grid"\nnoise = 0.0\nsamples = 1\n', "")
    .replace("[evaluate]", """[[charts]]
file = "run/manifold.safetensors"
least = 0.6
[[charts]]
file = "narrow/manifold.safetensors"
least = 0.25
most = 0.4
[[charts]]
file = ["other/manifold.safetensors", "narrow/manifold.safetensors"]
least = 0.25
[evaluate]""")
)  # fmt: skip


def test_manifolds_that_were_trained_apart_are_put_together(run: Run, place: Path) -> None:
    assert run(text=AGAIN.replace("lr = 1e-12", "lr = 1e-3"), folder="other") == (0, [])
    narrow = AGAIN.replace("lr = 1e-12", "lr = 1e-2").replace(
        "width = [0.25, 1.0]", "width = [0.25, 0.4]"
    )
    assert run(text=narrow, folder="narrow") == (0, [])
    assert run(text=CHARTS, folder="both") == (0, [])
    both = checkpoint.read(place / "both" / "manifold.safetensors")
    parts = {
        folder: checkpoint.read(place / folder / "manifold.safetensors")
        for folder in ("run", "other", "narrow")
    }
    mean = charts.mean([parts["other"], parts["narrow"]])
    for part, width in (
        (parts["run"], 1.0),
        (parts["run"], 0.7),
        (mean, 0.5),
        (parts["narrow"], 0.4),
        (parts["narrow"], 0.25),
    ):
        size = part.space.architecture(width, extrapolate=True)
        expected, found = dict(sample(part, size)), dict(sample(both, size))
        for name, value in expected.items():
            # A number is off by at most half of a 127th of its row's largest.
            bound = float(value.abs().max()) / 250
            torch.testing.assert_close(found[name], value, atol=bound, rtol=0)
    size = mean.space.architecture(0.5, extrapolate=True)
    found = dict(sample(both, size))
    for cycle in (parts["other"], parts["narrow"]):  # neither of which is the mean
        assert any(
            float((value - found[name]).abs().max()) > float(value.abs().max()) / 100
            for name, value in sample(cycle, size)
        )
    assert [each["least"] for each in both.about["charts"]] == [0.6, 0.25, 0.25]
    assert [each.get("most") for each in both.about["charts"]] == [None, [0.4], None]
    assert both.about["source"]["kind"] == "charts"
    # And one of them goes on by itself.
    alone = narrow.replace("run/manifold", "both/manifold").replace("[fit]", "[fit]\nchart = 1")
    alone = alone.replace("lr = 1e-2", "lr = 1e-12")
    assert run(text=alone, folder="alone") == (0, [])
    size = mean.space.architecture(0.3, extrapolate=True)
    expected = dict(sample(both, size))
    for name, value in sample(checkpoint.read(place / "alone" / "manifold.safetensors"), size):
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)
    for old, new, told in (
        ("chart = 1", "chart = 3", "fit.chart: 3 is not allowed; its charts are 0 to 2"),
        ("chart = 1", "", "fit.chart: None is not allowed; it must say which chart of "),
        ("[0.25, 0.4]", "[0.25, 0.5]", "fit.width: .*no channels of .* beyond a width of 0.4"),
        ("[fit]", "[fit]\nmost = [0.4, 0.4]", "fit.most: .*; one number for each of "),
        ("[fit]", "[fit]\nmost = [0.5]", "fit.most: 0.5 .*; numbers within fit.width, 0.25 to 0.4"),
        ("both/manifold", "run/manifold", "fit.chart: 1 .*has no charts"),
        ("[fit]", "[fit]\nsandwich = true", "fit.sandwich: True is not allowed; false: chart 1"),
    ):
        code, (line,) = run(text=alone.replace(old, new), folder="new")
        assert code == 2 and re.search(told, line), line
    # Or is put together with others again, as it was.
    taken = re.sub(r"file = .*manifold.safetensors.*", "@", CHARTS).split("@")
    takes = [f'file = "both/manifold.safetensors"\nchart = {k}' for k in range(3)]
    again = "".join(text + take for text, take in zip(taken, [*takes, ""], strict=True))
    assert run(text=again, folder="again") == (0, [])
    once, twice = (checkpoint.read(place / f / "manifold.safetensors") for f in ("both", "again"))
    for width in (1.0, 0.5, 0.3):
        expected = dict(sample(once, once.space.architecture(width)))
        for name, value in sample(twice, twice.space.architecture(width)):
            torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-5)
    assert twice.about["charts"] == once.about["charts"]
    # Or one is its mean with what went on from it.
    alone = alone.replace("chart = 1", "chart = 2").replace("[0.25, 0.4]", "[0.25, 1.0]")
    assert run(text=alone.replace("lr = 1e-12", "lr = 1e-2"), folder="further") == (0, [])
    both_files = 'file = ["both/manifold.safetensors", "further/manifold.safetensors"]\nchart = 2'
    assert run(text=again.replace(takes[2], both_files), folder="mean") == (0, [])
    size = once.space.architecture(0.5)
    further = checkpoint.read(place / "further" / "manifold.safetensors")
    before, after = dict(sample(once, size)), dict(sample(further, size))
    for name, value in sample(checkpoint.read(place / "mean" / "manifold.safetensors"), size):
        middle = torch.lerp(before[name], after[name], 0.5)
        bound = float(middle.abs().max()) / 250
        torch.testing.assert_close(value, middle, atol=bound, rtol=0)
        assert float((before[name] - after[name]).abs().max()) > bound
    code, (line,) = run(text=again.replace("chart = 2", "chart = 3"), folder="new")
    assert code == 2 and "charts[2].chart: 3 is not allowed; its charts are 0 to 2" in line
    for old, new, told in (
        ("most = 0.4", "most = 0.5", "charts[1].most: 0.5 is not allowed; 0.4 or less"),
        ("most = 0.4", "most = 1.0", "charts[1].most: 1.0 is not allowed; 0.4 or less"),
        ("chart = 1", "", "charts[1].chart: None is not allowed; it must say which chart"),
        (takes[2], 'file = ["run/manifold.safetensors", "other/manifold.safetensors"]\nchart = 2',
         "charts[2].chart: 2 is not allowed; it is of kind grid, which has no charts"),
    ):  # fmt: skip
        code, (line,) = run(text=again.replace(old, new), folder="new")
        assert code == 2 and told in line and not (place / "new").exists()
    code, (line,) = run(text=CHARTS.replace("other/", "none/"), folder="new")
    assert code == 2 and "charts[2].file[0]: 'none/manifold.safetensors'" in line
    code, (line,) = run(text=CHARTS.replace('"lenet"', '"resnet20"'), folder="new")
    assert code == 2 and "another network" in line and not (place / "new").exists()


def test_images_too_small_for_the_network_are_told(run: Run, place: Path) -> None:
    text = SMALL.replace("[fit]", "[fit]\nresolutions = [0.25, 1.0]")
    code, lines = run(text=text, folder="new")
    assert code == 2 and "fit.resolutions: 0.25" in lines[0] and "(2, 2) pixels" in lines[0]
    assert not (place / "new").exists()


def test_an_earlier_run_is_not_overwritten_and_an_unknown_one_not_resumed(
    run: Run, place: Path
) -> None:
    code, (line,) = run()
    assert code == 2 and "--resume" in line and "--folder" in line
    for written in (None, "{", "[]", '{"arch": "lenet"}'):  # the last: version 0.1
        path = place / "run" / "recipe.json"
        path.unlink() if written is None else path.write_text(written)
        code, (line,) = run("--resume")
        assert code == 2 and str(path) in line and "--folder" in line


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def strange(path: Path) -> None:
    """A whole file of another network."""
    if path.suffix == ".pt":
        torch.save({"net": {"a": torch.zeros(1)}, "model": {"a": torch.zeros(1)}}, path)
    else:
        save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [cut, empty, strange])
@pytest.mark.parametrize("name", ["source.pt", "source.safetensors", "fit.pt"])
def test_damaged_state_is_named_with_what_to_do_and_doing_it_helps(
    run: Run, place: Path, name: str, damage: Callable[[Path], None]
) -> None:
    if name == "source.pt":
        (place / "run" / "source.safetensors").unlink()
    damage(place / "run" / name)
    code, (line,) = run("--resume")
    assert code == 2 and f"{place / 'run' / name}: damaged" in line and "delete it" in line
    (place / "run" / name).unlink()
    assert run("--resume") == (0, [])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("batch = 512", "batch = 5000", ["fit.batch: 5000 is not allowed; at most 1297"]),
        ("batch = 256", "batch = 5000", ["network.train.batch: 5000 is not allowed; at most 1297"]),
        ('"lenet"', '"nowhere:net"', ["network.network: nowhere:net: cannot be imported"]),
        ('"lenet"', '"torch.nn:Flatten"', ["network.network: 'torch.nn:Flatten' is not allowed"]),
        ("width = [0.25, 1.0]", "width = [0.25, 1.0]\nmorph = ['conv9']", ["fit.morph: 'conv9'"]),
        (
            "width = [0.25, 1.0]",
            "width = [0.25, 1.0]\ndistill_features = 1.0\ndistill = 'source'",
            ["fit.distill_features: 1.0 is not allowed; 0: with these fit.morph no value inside"],
        ),
        (
            "width = [0.25, 1.0]",
            "width = [0.25, 1.0]\nblocks = [1, 2]",
            ["fit.blocks: .*no stages"],
        ),
        ("[network]", "task = 'segmentation'\n[network]", ["segmentation needs a mask"]),
        (
            'network = "lenet"\ntrain = { epochs = 1, lr = 0.1, batch = 256 }',
            'network = "nowhere:net"\ntrain = { epochs = 1, batch = 5000 }',
            ["network.train.batch: 5000", "network.network: .*nowhere"],
        ),
        ("widths = [1.0]", "widths = [3.0]", [r"evaluate.widths\[0\]: 3.0 is not allowed"]),
        ('"digits"', '"imagenet"', ["imagenet"]),
        ('"digits"', '"digits"\nkind = "tar"', ["data.kind: 'tar' is not allowed; one of classes"]),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_written(
    run: Run, place: Path, old: str, new: str, told: list[str]
) -> None:
    code, lines = run(text=SMALL.replace(old, new), folder="new")
    assert code == 2 and len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert re.search(part, line), line
    assert not (place / "new").exists()


FOLDERS = (
    SMALL.replace('name = "digits"', 'path = "birds"\nchannels = 1')
    .replace("batch = 256", "batch = 4")
    .replace("batch = 512", "batch = 4")
)


def test_the_classes_of_a_manifold_are_the_folders_that_the_recipe_names(
    run: Run, place: Path
) -> None:
    write(place / "birds", classes("wren", "finch", "owl", each=4))
    more = "\nsize = 6\nmean = [0.5]\nstd = [0.25]\nflips = true\npad = 1\n[representation]"
    text = FOLDERS.replace("\n[representation]", more)
    assert run("--data", str(place), text=text, folder="new") == (0, [])
    manifold = checkpoint.read(place / "new" / "manifold.safetensors")
    contract = manifold.contract
    assert contract.classes == ("finch", "owl", "wren")
    assert (contract.mean, contract.std) == ((0.5,), (0.25,))
    assert [sum(r for _, r in dim) for dim in manifold.space.graph.input[1:]] == [1, 6, 6]
    bound = json.loads((place / "new" / "recipe.json").read_text())["depends"]["source"]
    assert (bound["data.flips"], bound["data.pad"]) == (True, 1)
    code, (line,) = run("--data", str(place), "--resume", text=FOLDERS, folder="new")
    assert code == 2 and str(place / "new") in line


@pytest.mark.parametrize(
    ("files", "path", "told"),
    [
        (classes("wren", "owl") | {"train/owl/1.png": b""}, "birds", "owl/1.png"),
        (classes("owl"), "birds", "two class folders or more are needed"),
        ({f"{i}.png": encoded(pixels(i)) for i in range(11)}, "birds", "classification needs"),
        ({}, "birds", "data set 'birds' is not under"),
    ],
)
def test_images_that_cannot_be_trained_on_are_one_line_before_anything_is_written(
    run: Run, place: Path, files: dict[str, bytes], path: str, told: str
) -> None:
    write(place / "birds", files) if files else None
    text = FOLDERS.replace('"birds"', f'"{path}"')
    code, (line,) = run("--data", str(place), text=text, folder="new")
    assert code == 2 and told in line
    assert not (place / "new").exists()


def test_a_network_of_which_nothing_can_be_resized_is_told() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    asked, digits = recipe_file.load("tiny"), data.load("digits")
    graph = basis.traced(asked, digits, net).graph
    with pytest.raises(recipe.BadRecipe, match="fit.width: .*nothing in this network can be"):
        basis.space(asked, graph)


def test_calibration_images_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    told = recipe_file.load("tiny").as_dict()
    for name in ("noise", "own"):
        (tmp_path / name).mkdir()
    for name, found in (("noise", "noise"), ("own", str(tmp_path / "own")), ("gone", "gone")):
        told["data"]["calibration_images"] = name
        assert pipeline._images(recipe.parse(told, str(tmp_path / "x.toml"))) == found


def test_images_that_are_too_small_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    small = replace(digits, train_images=digits.train_images[:, :, :3, :])
    monkeypatch.setattr(basis, "dataset", lambda asked, root: small)
    code, (line,) = run(folder="new")
    assert code == 2 and "network.network" in line and "lenet" in line


def test_missing_weights_are_told_with_where_they_were_looked_for(place: Path) -> None:
    asked = recipe.parse(
        {
            "name": "x",
            "title": "x",
            "network": {"network": "resnet20", "weights": "a.th"},
            "data": {"name": "cifar10"},
            "fit": {"width": [0.5, 1.0]},
        },
        str(place / "x.toml"),
    )
    digits = data.load("digits")
    colour = replace(digits, train_images=digits.train_images.expand(-1, 3, -1, -1))
    with pytest.raises(recipe.BadRecipe, match="network.weights: 'a.th'") as told:
        basis.check(asked, colour, place / "checkpoints", place / "run2")
    assert str(place) in str(told.value) and str(place / "checkpoints") in str(told.value)
    (place / "a.th").write_bytes(b"")  # beside the recipe it is found
    basis.check(asked, colour, place / "checkpoints", place / "run2")


def test_a_result_that_cannot_be_written_is_told_before_anything_is(run: Run, place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "file").write_text("kept")
    for out in ("/dev/null", str(place), str(place / "fifo"), str(place / "file" / "m")):
        code, (line,) = run("--out", out, folder="new")
        assert code == 2 and line.startswith(f"neumeta-train: {out}: ")
    for folder in ("file", "small.toml/deep"):
        code, (line,) = run(folder=folder)
        assert code == 2 and "is a file" in line
    assert not (place / "new").exists() and (place / "fifo").is_fifo()
    assert (place / "file").read_text() == "kept" and Path("/dev/null").is_char_device()


def test_a_symlink_as_out_leads_to_the_result(run: Run, place: Path) -> None:
    (place / "link").symlink_to(place / "held.safetensors")
    assert run("--resume", "--out", str(place / "link")) == (0, [])
    assert (place / "link").is_symlink()
    assert checkpoint.read(place / "held.safetensors").about["title"] == "small"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "soon"])
def test_minutes_are_more_than_none(run: Run, minutes: str) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--max-minutes", minutes)
    assert ended.value.code == 2


def test_time_that_is_up_and_an_interruption_are_one_line_and_a_code(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, (line,) = run("--max-minutes", "1e-9", folder="new")
    assert code == 3 and "--resume" in line

    def interrupted(*_: Any, **__: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", interrupted)
    code, (line,) = run("--resume", folder="new")
    assert code == 130 and "--resume goes on" in line
    monkeypatch.undo()
    assert run("--resume", folder="new") == (0, [])


def test_a_manifold_that_is_not_finite_is_not_evaluated(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(manifold: Any, *_: Any, **__: Any) -> bool:
        next(manifold.representation.parameters()).data.fill_(torch.nan)
        return True

    monkeypatch.setattr(fit, "fit", diverged)
    code, (line,) = run("--resume", "--out", str(place / "new.safetensors"))
    assert code == 2 and "/32.64.64: sampled weights of conv1" in line
    assert "not finite" in line and not (place / "new.safetensors").exists()


LIMITED = """
import resource, sys
from training import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("room", "gone", "failed"),
    [
        (1000, None, "recipe.json"),
        (100_000, ["fit.pt", "source.pt", "source.safetensors"], "source.pt"),
        (250_000, ["fit.pt"], "fit.pt"),
    ],
)
def test_no_room_for_a_file_is_one_line_and_leaves_nothing(
    place: Path, room: int, gone: list[str] | None, failed: str
) -> None:
    """A bound on the size of a file stands for a full disk."""
    for name in gone or []:
        (place / "run" / name).unlink()
    before = {path: path.stat().st_size for path in (place / "run").glob("*")}
    arguments = [str(place / "small.toml"), "--folder", str(place / "run"), "--resume"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("neumeta-train:")]
    assert line == f"neumeta-train: {place / 'run' / failed}: File too large"
    assert not list(place.rglob("*.part"))
    after = {path: path.stat().st_size for path in (place / "run").glob("*")}
    assert {path: after.get(path) for path in before if path.name != "log"} == {
        path: size for path, size in before.items() if path.name != "log"
    }


def test_an_error_of_the_whole_run_is_told_by_its_first_process_alone(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL.replace("batch = 512", "batch = 5000"))
    words = ["--nproc-per-node", "2", "-m", "training.cli", "small.toml", "--folder", "new"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("neumeta-train:")]
    assert len(lines) == 1 and "fit.batch: 5000 is not allowed" in lines[0]


def test_another_process_tells_what_it_alone_meets(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[float]()
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    nowhere = SMALL.replace('name = "digits"', 'path = "nowhere"')
    assert run(text=nowhere, folder="new") == (2, [])  # the first one does not find them either
    assert waited and min(waited) >= 10

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "log")

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr(pipeline, "run", full)
    assert run(folder="new") == (2, ["neumeta-train: log: No space left on device"])


def test_the_readmes_line_for_several_processes_works_word_for_word(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    (torchrun .*)$", (ROOT / "README.md").read_text(), re.M)
    (tmp_path / "small.toml").write_text(SMALL)
    program, *words = shlex.split(line.replace("RECIPE", "small.toml"))
    assert program == "torchrun" and "--folder" in words
    # What the program `torchrun` is, which need not be on the PATH of the tests.
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / words[words.index("--folder") + 1]
    held = checkpoint.read(folder / "manifold.safetensors")
    assert held.about["title"] == "small"
    assert done.stdout.count("width 1") == 1  # the first process alone tells and writes
