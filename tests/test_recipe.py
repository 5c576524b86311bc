"""A recipe is right as a whole, or each problem is a line: file, key, value, what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training import recipe, recipe_file

TINY = recipe_file.load("tiny")
GOOD = """
title = "x"
[network]
network = "lenet"
train = { epochs = 1 }
[data]
name = "digits"
[fit]
width = [0.5, 1]
"""


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe_file.BUILT_IN.glob("*.toml")))
def test_built_in_recipes_are_right_and_survive_a_checkpoint(name: str) -> None:
    asked = recipe_file.load(name)
    assert asked.name == name and recipe.parse(asked.as_dict(), asked.file) == asked


@pytest.mark.parametrize("name", ["cifar10-resnet-charts", "cifar10-vgg-charts"])
def test_what_a_chart_is_the_mean_of_is_one_representation(name: str) -> None:
    for chart in recipe_file.load(name).charts:
        made_by = [recipe_file.of_run(Path(file).parent.name) for file in chart.file]
        built = [(each.representation.kind, each.representation.built) for each in made_by]
        assert all(each == built[0] for each in built), chart.file


def test_the_full_size_may_stay_untrained_where_only_widths_morph(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "full_weight = 0\n[representation]\nanchored = { reach = 0.1 }\n")
    asked = recipe_file.load(str(path))
    assert asked.fit.full_weight == 0 and asked.fit.blocks is None and not asked.fit.sandwich


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    base = GOOD.replace("epochs = 1 }", "epochs = 1, batch = 7 }")
    (tmp_path / "base.toml").write_text(f'name = "base"\nseed = 4\n{base}batch = 64\n')
    path = tmp_path / "mine.toml"
    text = 'extends = "base.toml"\ntitle = "y"\n[fit]\nbatch = 32\n[evaluate]\nwidths = [0.5]\n'
    path.write_text(text + "[network]\ntrain = { epochs = 2 }\n")
    asked = recipe_file.load(str(path))
    assert (asked.name, asked.title, asked.seed, asked.file) == ("mine", "y", 4, str(path))
    assert (asked.fit.width, asked.fit.batch, asked.evaluate.widths) == ((0.5, 1.0), 32, (0.5,))
    assert asked.network.network == "lenet" and asked.network.train
    assert (asked.network.train.epochs, asked.network.train.batch) == (2, 128)  # a whole value
    path.write_text('extends = "tiny"\ntitle = "y"\n')
    expected = TINY.changed(name="mine", title="y")
    assert recipe_file.load(str(path)).as_dict() == expected.as_dict()


def test_what_is_not_taken_over_is_as_by_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    without = 'without = ["network.train", "evaluate", "fit.widths"]'
    base = GOOD + "widths = [0.6]\n[evaluate]\nwidths = [0.7]\n"
    (tmp_path / "base.toml").write_text(base)
    path.write_text(f'extends = "base.toml"\n{without}\n[fit]\nstart = "m.safetensors"\n')
    asked = recipe_file.load(str(path))
    assert asked.network.train is None and asked.fit.widths == () and asked.fit.start
    assert asked.evaluate == recipe.EvaluateSection()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            'extends = "base.toml"',
            "mine.toml: extends: 'base.toml' is not allowed; it extends 'tiny'",
        ),
        (
            'extends = "mine.toml"',
            "mine.toml: extends: 'mine.toml' is not allowed; it extends 'mine",
        ),
        (
            'extends = "none.toml"',
            "mine.toml: extends: 'none.toml' is not allowed; it must be a .toml",
        ),
        (
            'extends = "../base.toml"',
            "mine.toml: extends: '../base.toml' is not allowed; it must be",
        ),
        ('extends = "nine"', "camvid-unet, cifar10-resnet"),
        (f'extends = "{"n" * 300}"', "is not allowed; it must be a .toml file in the same folder"),
        ("extends = 3", "mine.toml: extends: 3 is not allowed; it must be a .toml file"),
        ('extends = "broken.toml"', "broken.toml: Invalid value"),
        ('extends = "tiny"\n[fit]\nlr = -1', "mine.toml (extends tiny): fit.lr: -1 is not allowed"),
        ('extends = "tiny"\nwithout = ["fit.no"]', "mine.toml: without: 'fit.no' is not allowed"),
        (
            'extends = "tiny"\nwithout = "fit.lr"',
            "mine.toml: without: 'fit.lr' is not allowed; it must",
        ),
        ('extends = "tiny"\nwithout = [7]', "mine.toml: without: 7 is not allowed"),
        ('extends = "tiny"\nwithout = ["fit", "fit.lr"]', "without: 'fit.lr' is not allowed; each"),
        ('without = ["fit.lr"]', "mine.toml: without: there must be `extends` beside it"),
        ('extends = "bare.toml"', "bare.toml: without: there must be `extends` beside it"),
        ('extends = "tiny"\nnetwork = 3', "mine.toml (extends tiny): network: 3 is not allowed"),
        (
            'extends = "cifar10-vgg-wide"',
            "its network is in 'vgg.py', which is not in this folder",
        ),
    ],
)
def test_what_is_extended_is_one_whole_recipe_that_can_be_read(
    tmp_path: Path, text: str, told: str
) -> None:
    (tmp_path / "base.toml").write_text('extends = "tiny"\n')
    (tmp_path / "broken.toml").write_text("title = \n")
    (tmp_path / "bare.toml").write_text('without = ["fit.lr"]\n')
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(recipe.BadRecipe) as error:
        recipe_file.load(str(path))
    assert told in str(error.value)


def test_a_file_of_the_users_own_stands_for_the_one_that_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "cifar10-vgg-wide"\n')
    (tmp_path / "vgg.py").write_text((recipe_file.BUILT_IN / "vgg.py").read_text())
    assert recipe_file.load(str(path)).network.network == "vgg.py:build"
    (tmp_path / "vgg.py").rename(tmp_path / "other.py")
    path.write_text('extends = "cifar10-vgg-wide"\n[network]\nnetwork = "other.py:build"\n')
    assert recipe_file.load(str(path)).network.network == "other.py:build"


def test_a_run_is_of_the_recipe_that_its_folder_is_named_after() -> None:
    asked = recipe_file.of_run("tiny-seed-3")
    assert asked.as_dict() == TINY.seeded(3).as_dict()
    assert (asked.name, asked.seed) == ("tiny-seed-3", 3)
    assert recipe_file.of_run("tiny").as_dict() == TINY.as_dict()
    for name in ("tiny-seed-", "tiny-seed-x", "tiny-seed--1", "tiny-seed-1-seed-2", ""):
        with pytest.raises(recipe.BadRecipe, match="neither"):
            recipe_file.of_run(name)


def test_a_whole_number_stands_for_a_real_one_and_defaults_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    asked = recipe_file.load(str(path))
    assert asked.name == "mine" and asked.file == str(path)
    assert asked.fit.width == (0.5, 1.0) and asked.fit.batch == 128 and asked.seed == 0
    assert asked.served == "lenet" and asked.representation.kind == "grid" and not asked.folded
    assert asked.changed(representation={"kind": "integral"}).folded
    mine = asked.changed(network={"network": "nets/mine.py:build"})
    theirs = asked.changed(network={"network": "torchvision.models:resnet18"})
    assert (mine.served, theirs.served) == ("mine", "resnet18")
    assert mine.changed(network={"name": "other"}).served == "other"


@pytest.mark.parametrize(
    ("change", "key", "value", "allowed"),
    [
        ({"fit": {"lr": "fast"}}, "fit.lr", "'fast'", "a number"),
        ({"fit": {"lr": float("nan")}}, "fit.lr", "nan", "finite"),
        ({"fit": {"lr": True}}, "fit.lr", "True", "a number"),
        ({"fit": {"width": 0.5}}, "fit.width", "0.5", "a list"),
        ({"fit": {"width": [1.0, 0.5]}}, "fit.width", "[1.0, 0.5]", "smaller end"),
        ({"fit": {"width": [0.0, 0.5]}}, "fit.width[0]", "0.0", "greater than 0"),
        ({"fit": {"widths": [0.1]}}, "fit.widths", "0.1", "0.25 to 1"),
        ({"fit": {"batch": 0}}, "fit.batch", "0", "equal to 1"),
        ({"fit": {"batch": 1.5}}, "fit.batch", "1.5", "a whole number"),
        ({"fit": {"epochs": -1}}, "fit.epochs", "-1", "equal to 0"),
        ({"fit": {"sandwich": "yes"}}, "fit.sandwich", "'yes'", "true or false"),
        ({"fit": {"distill_weight": 7}}, "fit.distill_weight", "7", "equal to 1"),
        ({"fit": {"distill": "both"}}, "fit.distill", "'both'", "'inplace'"),
        ({"fit": {"ema": 1.5}}, "fit.ema", "1.5", "equal to 1"),
        ({"fit": {"depth_noise": 0.6}}, "fit.depth_noise", "0.6", "equal to 0.5"),
        ({"fit": {"morph": []}}, "fit.morph", "[]", "empty"),
        ({"fit": {"blocks": [1, 30]}}, "fit.blocks", "[1, 30]", "fit.most_blocks, 9"),
        ({"fit": {"shallow": 2}}, "fit.shallow", "2", "true, false or a list of stages"),
        ({"fit": {"shallow": []}}, "fit.shallow", "[]", "true, false or a list of stages"),
        ({"fit": {"shallow": [-1]}}, "fit.shallow", "[-1]", "true, false or a list of stages"),
        ({"fit": {"shallow": True, "blocks": None}}, "fit.shallow", "True", "it needs fit.blocks"),
        ({"charts": [{"file": "a", "least": 0.2, "most_blocks": 0}, {"file": "b", "least": 0.2}]},
         "charts[0].most_blocks[0]", "0", "greater than or equal to 1"),
        ({"charts": [{"file": "a", "least": 0.2, "most_blocks": "1"}, {"file": "b", "least": 0.2}]},
         "charts[0].most_blocks", "'1'", "it must be a number or a list of numbers"),
        ({"charts": [{"file": "a", "least": 0.2, "most": True}, {"file": "b", "least": 0.2}]},
         "charts[0].most", "True", "it must be a number or a list of numbers"),
        ({"charts": [{"file": "a", "least": 0.2, "most": 3.0}, {"file": "b", "least": 0.2}]},
         "charts[0].most[0]", "3.0", "less than or equal to 2"),
        ({"charts": [{"file": "a", "least": 0.2, "most": []}, {"file": "b", "least": 0.2}]},
         "charts", "['a', 'b']", "charts[0].most: 0 numbers; it must be a number"),
        ({"charts": [{"file": "a", "least": 0.2, "blocks": 2, "most_blocks": [2, 1]},
                     {"file": "b", "least": 0.2}]}, "charts", "['a', 'b']", "blocks is from 2 to 1"),
        ({"fit": {"width": [1.0, 1.0]}}, "fit.width", "[1.0, 1.0]", "fit.blocks"),
        ({"network": {"named": {"deep": [5]}}}, "network.named", "{'deep': (5,)}", "fit.blocks"),
        ({"task": "sorting"}, "task", "'sorting'", "'generation'"),
        ({"task": "segmentation", "fit": {"feature_views": 2}}, "fit.feature_views", "2", "stream"),
        ({"fit": {"teacher_views": 2}}, "fit.teacher_views", "2", "distill"),
        ({"fit": {"distill_features": 1.0}}, "fit.distill_features", "1.0", "distill"),
        ({"fit": {"distill_features": 1.0, "distill": "source", "teacher_views": 1}},
         "fit.distill_features", "1.0", "no fit.teacher_views"),
        ({"fit": {"distill_features": 1.0, "distill": "source", "blocks": [1, 3]}},
         "fit.distill_features", "1.0", "no fit.blocks"),
        ({"fit": {"resolutions": []}}, "fit.resolutions", "[]", "at least 1"),
        ({"fit": {"resolutions": [0.1]}}, "fit.resolutions[0]", "0.1", "equal to 0.25"),
        ({"fit": {"resolutions": [0.5, 1.0], "distill": "source"}}, "fit.resolutions", "[0.5, 1.0]",
         "teacher_views"),
        ({"task": "segmentation", "network": {"train": {"epochs": 1, "resolutions": [0.5]}}},
         "network.train.resolutions", "[0.5]", "classification"),
        ({"task": "segmentation", "fit": {"resolutions": [0.5]}}, "fit.resolutions", "[0.5]",
         "classification"),
        ({"fit": {"start": "m.safetensors"}, "network": {"weights": "w.th"}}, "network.weights",
         "'w.th'", "beside fit.start"),
        ({"charts": [{"file": "m.safetensors", "least": 0.2}], "network": {"weights": "w.th"}},
         "network.weights", "'w.th'", "beside charts"),
        ({"charts": [{"file": "a", "least": 0.25}, {"file": "b", "least": 0.5}]}, "charts",
         "['a', 'b']", "charts[0] already takes all sizes of charts[1]"),
        ({"charts": [{"file": "a", "least": 0.2, "most": 0.5}]}, "charts", "['a']", "the last one"),
        ({"charts": [{"file": "a", "least": 0.2, "most_blocks": 2}]}, "charts", "['a']",
         "the last one"),
        ({"charts": ["a"]}, "charts[0]", "'a'", "it must be a section [charts[0]]"),
        ({"fit": {"chart": 1}}, "fit.chart", "1", "it needs fit.start"),
        ({"task": "segmentation", "fit": {"bfloat16": True}}, "fit.bfloat16", "True",
         "unless the task is classification"),
        ({"task": "segmentation", "network": {"train": {"epochs": 1, "bfloat16": True}}},
         "network.train.bfloat16", "True", "unless the task is classification"),
        ({"charts": [{"file": "a", "least": 0.6, "most": 0.5}, {"file": "b", "least": 0.2}]}, "charts",
         "['a', 'b']", "no width is from 0.6 to 0.5"),
        ({"charts": [{"file": "a", "least": 0.9 - k / 100} for k in range(17)] + [
            {"file": "b", "least": 0.2}]}, "charts", "18", "at most 16"),
        ({"charts": [{"file": [], "least": 0.2}]}, "charts[0].file", "[]", "at least 1"),
        ({"charts": [{"file": "a", "least": 0.2, "blocks": 3}]}, "charts.blocks", "3", "fit.blocks"),
        ({"charts": [{"file": "a", "least": 0.9}]}, "charts.least", "0.9", "fit.width"),
        ({"charts": [{"file": "a", "least": 0.2}], "fit": {"start": "m"}}, "fit.start", "'m'",
         "beside charts"),
        ({"data": {"calibration": 1}}, "data.calibration", "1", "equal to 2"),
        ({"fit": {"most": [0.5, 2.0]}}, "fit.most", "2.0", "numbers within fit.width"),
        ({"fit": {"most": [0.5], "sandwich": True}}, "fit.most", "[0.5]", "left out with fit.sandwich"),
        ({"fit": {"full_weight": 0}}, "fit.full_weight", "0.0", "representation.anchored"),
        ({"fit": {"full_weight": 0, "sandwich": True}, "representation": {"anchored": {"reach": 0.1}}},
         "fit.full_weight", "0.0", "no fit.sandwich unless"),
        ({"network": {"network": "vgg"}}, "network.network", "'vgg'", "resnet20"),
        ({"network": {"train": {"epochs": -1}}}, "network.train.epochs", "-1", "equal to 0"),
        ({"data": {"name": ""}}, "data", "['', '']", "a name or a path"),
        ({"data": {"channels": 2}}, "data.channels", "2", "1 or 3"),
        ({"data": 5}, "data", "5", "a section [data]"),
        ({"order": {"strategy": "tsp"}}, "order.strategy", "'tsp'", "'mshp'"),
        ({"representation": {"noise": 0.7}}, "representation.noise", "0.7", "equal to 0.5"),
        ({"representation": {"options": {"nodes": "x"}}}, "representation.options.nodes", "'x'",
         "a whole number"),
        ({"evaluate": {"widths": [3.0]}}, "evaluate.widths[0]", "3.0", "equal to 2"),
        ({"evaluate": {"blocks": [1, 2]}}, "evaluate.blocks", "[1, 2]", "fit.blocks"),
        ({"seed": -1}, "seed", "-1", "equal to 0"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_file_key_value_and_what_is_allowed(
    change: dict[str, Any], key: str, value: str, allowed: str
) -> None:
    with pytest.raises(recipe.BadRecipe) as told:
        TINY.changed(**change)
    lines = str(told.value).splitlines()
    assert any(
        line.startswith(f"{TINY.file}: {key}: {value} is not allowed; ")
        and allowed in line.split("; ", 1)[1]
        for line in lines
    ), lines


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"fit": {"learning_rate": 3}}, "fit.learning_rate: no such key; [fit] has morph, width"),
        ({"lr": 3}, "lr: no such key; the top level has name, title"),
        (
            {"charts": [{"file": "a", "least": 0.2, "chrt": 1}]},
            "charts[0].chrt: no such key; [charts[0]] has file, chart, least, blocks",
        ),
        ({"charts": [{"file": "a"}]}, "charts[0].least: is missing; [charts[0]] has file, chart"),
        (
            {"network": {"train": {"lr": 0.1}}},
            "network.train.epochs: is missing; [network.train] has epochs, lr, batch",
        ),
        ({"network": {"train": None}}, "network.train: is missing; without network.weights"),
        (
            {"representation": {"anchored": {}}},
            "representation.anchored.reach: is missing; 'anchored' has reach, growth",
        ),
        (
            {"representation": {"options": {"hidden": 3}}},
            "representation.options.hidden: no such key; 'grid' has nodes, stepped",
        ),
    ],
)
def test_a_key_that_is_unknown_or_missing_is_told_with_those_there_are(
    change: dict[str, Any], line: str
) -> None:
    with pytest.raises(recipe.BadRecipe) as told:
        TINY.changed(**change)
    assert str(told.value).startswith(f"{TINY.file}: {line}")


def test_all_problems_are_told_at_once() -> None:
    changes = {"lr": "fast", "batch": 0, "zz": 1}
    with pytest.raises(recipe.BadRecipe) as told:
        TINY.changed(fit=changes, evaluate={"widths": 1.0})
    lines = str(told.value).splitlines()
    assert len(lines) == 4 and all(line.startswith(TINY.file) for line in lines)
    with pytest.raises(recipe.BadRecipe) as told:
        TINY.changed(fit={"morph": [], "width": [1.0, 0.5], "widths": [2.0]})
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize("text", ["title =", "\xff", "data = 'digits'\narch = 'lenet'"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(recipe.BadRecipe) as told:
        recipe_file.load(str(path))
    assert all(line.startswith(f"{path}: ") for line in str(told.value).splitlines())
    with pytest.raises(recipe.BadRecipe, match="neither a .toml file nor one of .*tiny"):
        recipe_file.load("huge")
