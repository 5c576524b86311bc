"""A recipe: every number of one published result, one section per stage, checked as a whole.

Knows no stage's work; each stage reads its own section. One entrance for files, changes and what a
checkpoint holds: `parse`. All problems that can be seen together are told together.
"""

from __future__ import annotations

import inspect
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from neumeta.representation import KINDS, MOST_CHARTS, WRAPPERS, Sizes, check_sizes
from neumeta.space import MAX_WIDTH, MOST_BLOCKS
from training.data import KINDS as DATA_KINDS
from training.data import KNOWN
from training.networks import BUILT_IN as NETWORKS

BUILT_IN = Path(__file__).parent / "recipes"

Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Noise = Annotated[float, Field(ge=0, le=0.5)]
Width = Annotated[float, Field(gt=0, le=MAX_WIDTH)]
Count = Annotated[int, Field(ge=1)]
Resolution = Annotated[float, Field(ge=0.25, le=1)]
Range = tuple[Count, Count]


def _square(size: object) -> object:
    return (size, size) if isinstance(size, int) else size


class BadRecipe(ValueError):
    """A recipe that cannot be run: one line for each problem, with the file, the key, the value given
    and what is allowed."""

    def __init__(self, file: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Training(_Section):
    """How the source network is trained: epochs of the training set, the peak of the learning rate,
    images per step, `resolutions` and `bfloat16` as in [fit]."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Rate = 0.05
    batch: Count = 128
    resolutions: Annotated[tuple[Resolution, ...], Field(min_length=1)] = (1.0,)
    bfloat16: bool = False


class NetworkSection(_Section):
    """The source network: a built-in one by its name, or the function that makes the user's own,
    `file.py:build` (from the recipe's folder) or `module:function`, called with `arguments`.

    `weights` is a file of tensors, looked for beside the recipe and under --checkpoints. Without
    `train` the network is taken as it is; with it it is trained, from `weights` on if there are any.
    `groups` are patterns over axis names, one group of widths each (none: one for each block of the
    module tree). `name` is what the manifold is served as (empty: the network's own), and `named` are
    names of depths, e.g. { resnet32 = [5, 5, 5] }.
    """

    network: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str = ""
    train: Training | None = None
    groups: tuple[str, ...] = ()
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    named: dict[str, tuple[Count, ...]] = Field(default_factory=dict)


class DataSection(_Section):
    """The images: a set that is known by `name`, or what lies at `path`. The other keys are the data
    loader's options; a key that is not given is the loader's own choice. `size` is height and width
    in pixels, one number for both; `mean` and `std` of each channel, in 0..1; `classes` their names.

    `calibration` is how many images travel in the manifold, for the batch statistics of sizes that
    are not kept: `calibration_images` are 'training' ones, 'noise' where none may travel (sizes that
    are not kept then lose score), or the user's own, a folder, archive or .npz, of which the statistics
    that are kept are measured too.
    """

    name: str = ""
    path: str = ""
    kind: str | None = None
    size: Annotated[tuple[Count, Count] | None, BeforeValidator(_square)] = None
    channels: Literal[1, 3] | None = None
    mean: tuple[Share, ...] | None = None
    std: tuple[Rate, ...] | None = None
    flips: bool | None = None
    pad: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    workers: Annotated[int, Field(ge=0)] | None = None
    ignore: int | None = None
    classes: tuple[str, ...] | None = None
    calibration: Annotated[int, Field(ge=2, le=4096)] = 128
    calibration_images: str = "training"

    def options(self) -> dict[str, Any]:
        """The loader's options that were given, as it takes them."""
        others = {"name", "path", "calibration", "calibration_images"}
        given = self.model_dump(exclude=others, exclude_none=True)
        return given | {key: list(given[key]) for key in ("mean", "std") if key in given}


class OrderSection(_Section):
    """The channel order."""

    strategy: Literal["none", "random", "layer-greedy", "layer-2opt", "mshp"] = "mshp"


class RepresentationSection(_Section):
    """What holds the weights: its `kind` and that kind's `options`; around it what is `centred` (its
    filters behind a ReLU sum to zero), what is `anchored` to the source near its size, what is
    `corrected` and what is `expanded` by size, each with its own options.

    `noise` is the coordinate noise a of Algorithms 2 and 3, in channels; `samples` the default K of
    Algorithm 3; `scale` is N.
    """

    kind: Literal["mlp", "grid", "integral"] = "grid"
    options: dict[str, Any] = Field(default_factory=dict)
    centred: dict[str, Any] | None = None
    anchored: dict[str, Any] | None = None
    corrected: dict[str, Any] | None = None
    expanded: dict[str, Any] | None = None
    noise: Noise = 0.0
    samples: Count = 1
    scale: Count = 64

    @property
    def built(self) -> dict[str, Any]:
        """The options as `representation.build` takes them: those of a wrapper under its name."""
        around = {name: getattr(self, name) for name in WRAPPERS}
        return self.options | {name: held for name, held in around.items() if held is not None}


def _stages(value: object) -> object:
    if isinstance(value, list | tuple) and value:
        if all(type(stage) is int and stage >= 0 for stage in value):
            return value
    elif isinstance(value, bool):
        return value
    raise ValueError("it must be true, false or a list of stages, the first of which is 0")


class FitSection(_Section):
    """Algorithm 2. Units: rates per step, epochs of the training set, widths as factors.

    `morph` are patterns over axis names; `width` and `blocks` the trained ranges, `most_blocks` a bound
    beyond them. `folded`: the representation learns the source without its batch norms, which its
    layers took up (the paper's folded training; what an mlp and an integral do unless told
    otherwise); else with them, on statistics of each batch. Before any image,
    `regression_steps` on the smoothed weights. `widths`: the pool that random widths come from
    (empty: the whole range); `most`: the largest that is trained of each group
    (empty: the range's). `sandwich`: each step trains the largest, the smallest and one random
    architecture; where width and depth both morph, the smallest, one of a random width, one of a random
    depth (at full width as often as not), and the largest if `full_weight` counts it. `smallest`: the
    share of random widths that are the smallest; `per_group`: of the others, the share that differs by
    group; `per_depth`: the share of random widths that come with a random depth (half of these with
    the same in all stages), where both morph; the others have the source's. `shallow`: of every
    random network one stage, drawn at random, has the fewest blocks; a list says which it may be (the
    first is 0). `full_weight`: of the largest in the loss; 0 where the representation keeps the
    source's own size as it is (anchored).
    `distill`: 'none', 'source' (the source network teaches) or 'inplace' (the full-size sample
    teaches the smaller ones), with `distill_weight` of the loss. `distill_features`: of feature
    distillation, added to the loss where the source teaches: what is made inside, wherever that has one
    shape at every width.
    `depth_noise`: of the borders between blocks, in blocks. `warm`: the share of steps in which the
    learning rate rises; `ema`: of the moving average; `clip`: of a gradient's entries, 0 for none.
    `feature_views`: activations of the frozen leading part computed once for this many augmented
    passes (0: run it in every step).

    `start` is a manifold's file to go on from, of the same network and representation, in place of a
    source network: its channel orders stay, and its own full size is the source. Of a manifold of
    charts, `chart` says from which (the first is 0). `copied` is a manifold's file of the same network
    whose representation may be another: it too stands in place of a source network, and the regression
    learns what it makes at the sizes that training draws. `resolutions`: sides
    of the training images as shares of the full ones, each for an equal part of the steps, e.g. [0.5,
    0.75, 1.0]: most of what a network learns it learns from small images, at a third of the cost.
    `teacher_views`: the source's outputs computed once for this many augmented passes, of whole images
    (0: the source runs in every step). `bfloat16`: the sampled networks, and the hidden layers of an
    mlp, run in sixteen bits (torch.autocast), weights, losses and the optimiser stay in float32; worth
    it where the processor has instructions for that.
    """

    morph: tuple[str, ...] = ("*",)
    width: tuple[Width, Width]
    blocks: Range | None = None
    most_blocks: Annotated[int, Field(ge=1, le=MOST_BLOCKS)] = 9
    folded: bool | None = None
    regression_steps: Annotated[int, Field(ge=0)] = 0
    regression_lr: Rate = 3e-3
    epochs: Weight = 1.0
    batch: Count = 128
    optimiser: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 1e-3
    weight_decay: Weight = 1e-2
    clip: Weight = 10.0
    warm: Share = 0.1
    ema: Share = 0.995
    widths: tuple[Width, ...] = ()
    most: tuple[Width, ...] = ()
    sandwich: bool = False
    smallest: Share = 0.0
    per_group: Share = 0.0
    per_depth: Share = 0.0
    shallow: Annotated[bool | tuple[int, ...], BeforeValidator(_stages)] = False
    full_weight: Weight = 1.0
    reconstruction: Weight = 1.0
    regularisation: Weight = 1e-4
    distill: Literal["none", "source", "inplace"] = "none"
    distill_weight: Share = 1.0
    distill_features: Weight = 0.0
    depth_noise: Noise = 0.0
    augment: bool = True
    feature_views: Annotated[int, Field(ge=0)] = 0
    start: str = ""
    chart: Annotated[int, Field(ge=0)] | None = None
    copied: str = ""
    resolutions: Annotated[tuple[Resolution, ...], Field(min_length=1)] = (1.0,)
    teacher_views: Annotated[int, Field(ge=0)] = 0
    bfloat16: bool = False

    def widest(self, group: int) -> float:
        """The largest width of this group that is trained."""
        return self.most[group] if group < len(self.most) else self.width[1]

    @property
    def shallow_stages(self) -> tuple[int, ...]:
        """The stages that `shallow` lists; none if it lists none."""
        return self.shallow if isinstance(self.shallow, tuple) else ()


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _each(value: object) -> object:
    return (value,) if type(value) in (int, float) else value


class ChartSection(_Section):
    """One of several manifolds that were trained apart and are put together: its `file`, or several
    whose mean it is (cycles of one training, or trainings from one start), and the sizes that are
    drawn from it: all groups have from `least` to `most` of the source's width, all stages from
    `blocks` to `most_blocks` blocks (lists: of each group, of each stage). Of a file of charts,
    `chart` says which one it is; beside it may stand a manifold that went on from that chart
    (`fit.chart`)."""

    file: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_one_or_more)]
    chart: Annotated[int, Field(ge=0)] | None = None
    least: Width
    blocks: Annotated[int, Field(ge=0)] = 0
    most: Annotated[
        Annotated[tuple[Width, ...], Field(min_length=1)] | None, BeforeValidator(_each)
    ] = None
    most_blocks: Annotated[
        Annotated[tuple[Count, ...], Field(min_length=1)] | None, BeforeValidator(_each)
    ] = None

    @property
    def sizes(self) -> Sizes:
        """The sizes, as the representation has them."""
        most, deepest = self.most or Sizes.most, self.most_blocks or Sizes.most_blocks
        return Sizes(self.least, self.blocks, most, deepest)


class EvaluateSection(_Section):
    """The sizes of the evaluation table, also outside the trained ranges."""

    widths: tuple[Width, ...] = (1.0,)
    blocks: Range | None = None


class Recipe(_Section):
    """One run of the pipeline. `name` is the file's; every random choice follows from `seed`.

    With `charts`, the largest sizes first, nothing is trained: the run puts these manifolds together,
    measures statistics and scores, and of [fit] it reads `width`, `blocks` and `most_blocks`.
    """

    name: Annotated[str, Field(min_length=1)]
    title: str
    task: Literal["classification", "segmentation", "generation"] = "classification"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    network: NetworkSection
    data: DataSection
    order: OrderSection = OrderSection()
    representation: RepresentationSection = RepresentationSection()
    fit: FitSection
    charts: tuple[ChartSection, ...] = ()
    evaluate: EvaluateSection = EvaluateSection()
    _file: str = PrivateAttr("")

    @property
    def file(self) -> str:
        """Where the recipe was read from, for messages."""
        return self._file

    @property
    def served(self) -> str:
        """What the manifold is served as: `mynet` of 'mynet.py:build', `resnet18` of
        'torchvision.models:resnet18'."""
        path, _, function = self.network.network.rpartition(":")
        own = Path(path).stem if path.endswith(".py") else function
        return self.network.name or own

    @property
    def begun(self) -> str:
        """The manifold's file in place of a source network: it is gone on from, or copied."""
        return self.fit.start or self.fit.copied

    @property
    def folded(self) -> bool:
        """Whether the representation learns the source without its batch norms."""
        kind = self.representation.kind
        return kind != "grid" if self.fit.folded is None else self.fit.folded

    @property
    def wide(self) -> bool:
        """Whether widths morph."""
        return self.fit.width[0] < self.fit.width[1]

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, for the checkpoint; `parse` reads it."""
        return self.model_dump(mode="json")

    def changed(self, **changes: Any) -> Recipe:
        """This recipe with other values, e.g. `changed(seed=1, fit={"lr": 0.1})`: a section's other
        keys stay. Raises BadRecipe."""
        return parse(_changed(self.model_dump(), changes), self.file)

    def seeded(self, seed: int) -> Recipe:
        """This recipe with another seed, under a name of its own. Raises BadRecipe."""
        return self.changed(seed=seed, name=f"{self.name}-seed-{seed}")


def load(name: str) -> Recipe:
    """The recipe of this name among the built-in ones, or in this TOML file. Raises BadRecipe.

    Beside the keys of `Recipe` a file may have two more. `extends`, the name of a built-in recipe or
    of a file in the same folder, takes over the values of that one, which must not extend another: no
    more than two files are to be read. A key that the file has itself replaces the whole value, a
    table such as `network.train` too, and all `charts`. `without` lists keys that are not taken over.
    """
    path = _path(name, Path())
    if path is None:
        raise BadRecipe("recipe", [f"{name!r} is neither a .toml file nor one of {_built_in()}"])
    own = _read(path)
    if "extends" not in own:
        return parse({"name": path.stem, **own}, str(path))
    values, base = _extended(own, path)
    return parse({"name": path.stem, **values}, f"{path} (extends {base})", str(path))


def of_run(name: str) -> Recipe:
    """The built-in recipe that makes the run of this name, `seeded` where that says so. Raises
    BadRecipe."""
    told = re.fullmatch(r"(.+)-seed-(\d{1,19})", name)
    return load(told[1]).seeded(int(told[2])) if told else load(name)


def _extended(own: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """All values of a file that extends another, and what it extends. Raises BadRecipe."""

    def problem(key: str, given: object, allowed: str) -> BadRecipe:
        return BadRecipe(str(path), [refused(key, given, allowed)])

    base, without = own.pop("extends"), own.pop("without", [])
    under = _path(base, path.parent) if isinstance(base, str) and "/" not in base else None
    if under is None:
        allowed = f"it must be a .toml file in the same folder, or one of {_built_in(whole=True)}"
        raise problem("extends", base, allowed)
    values = _read(under)
    values.pop("name", None)  # of the file that is read, as its run's folder is
    if "extends" in values:
        allowed = f"it extends {values['extends']!r} itself: extend that one"
        raise problem("extends", base, allowed)
    if not isinstance(without, list):
        raise problem("without", without, "it must be a list of keys, like ['fit.start']")
    for key in without:
        section, _, inner = str(key).rpartition(".")
        held = values.get(section) if section else values
        if not isinstance(held, dict) or held.pop(inner, None) is None:
            allowed = f"each must be a key of {base}, like 'fit.start', and not be listed twice"
            raise problem("without", key, allowed)
    made = _changed(values, own)
    file = _python_file(values)
    there = under.parent.resolve() == path.parent.resolve() or (path.parent / file).is_file()
    if file and not there and _python_file(made) == file:
        allowed = (
            f"its network is in {file!r}, which is not in this folder: give network.network, too"
        )
        raise problem("extends", base, allowed)
    return made, base


def _python_file(values: Mapping[str, Any]) -> str:
    section = values.get("network")
    network = section.get("network") if isinstance(section, dict) else None
    file = network.rpartition(":")[0] if isinstance(network, str) else ""
    return file if file.endswith(".py") else ""


def _path(name: str, folder: Path) -> Path | None:
    path = folder / name if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    try:
        return path if path.is_file() else None
    except OSError:  # a name that is too long for one
        return None


def _built_in(whole: bool = False) -> str:
    """Their names; only of those which extend no other, if they must be `whole`."""
    found = sorted(BUILT_IN.glob("*.toml"))
    return ", ".join(each.stem for each in found if not (whole and "extends" in _read(each)))


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(values)
    for key, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(made.get(key), dict)
        made[key] = {**made[key], **value} if inside else value
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(str(path), [str(error)]) from None
    if "without" in values and "extends" not in values:
        raise BadRecipe(str(path), ["without: there must be `extends` beside it"])
    return values


def parse(values: Mapping[str, Any], told: str, file: str = "") -> Recipe:
    """The recipe of these plain values (lists stand for tuples). `told` is named in BadRecipe; it is
    the `file` unless that is given."""
    try:
        recipe = Recipe.model_validate(_frozen(dict(values)))
    except ValidationError as error:
        raise BadRecipe(told, [_told(each) for each in error.errors()]) from None
    problems = list(_conflicts(recipe))
    if problems:
        raise BadRecipe(told, problems)
    recipe._file = file or told
    return recipe


def refused(key: str, given: object, allowed: str) -> str:
    """One problem's line: the key, what was given, what is allowed."""
    shown = repr(list(given)) if isinstance(given, tuple) else repr(given)
    return f"{key}: {shown if len(shown) <= 60 else shown[:57] + '...'} is not allowed; {allowed}"


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


_SAYS = {
    "Value error, ": "",
    "Input should be": "it must be",
    "a valid tuple": "a list",
    "a valid boolean": "true or false",
    "a valid string": "text in quotes",
    "a valid number": "a number",
    "a valid integer": "a whole number",
}


def _told(error: ErrorDetails, inside: str = "") -> str:
    """One line of ours from one of pydantic's errors."""
    key = inside
    for part in error["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    parent, _, last = key.rpartition(".")
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key; {_keys(parent)}"
    if error["type"] == "missing":
        return f"{key}: is missing; {_keys(parent)}"
    if error["type"] == "model_type":
        return refused(key, error["input"], f"it must be a section [{key}]; {_keys(key)}")
    allowed = error["msg"]
    for theirs, ours in _SAYS.items():
        allowed = allowed.replace(theirs, ours)
    return refused(key, error["input"], allowed)


def _keys(section: str) -> str:
    """What a section may hold, in words."""
    held: Any = Recipe
    for part in filter(None, section.split(".")):
        hint = held.model_fields[part.partition("[")[0]].annotation
        hints = (hint, *typing.get_args(hint))
        held = next(each for each in hints if inspect.isclass(each) and issubclass(each, _Section))
    where = f"[{section}]" if section else "the top level"
    names = [*held.model_fields, *(() if section else ("extends", "without"))]
    return f"{where} has {', '.join(names)}"


def _conflicts(recipe: Recipe) -> Iterator[str]:
    """What is wrong between keys, one line each."""
    network, fit, listed = recipe.network, recipe.fit, recipe.evaluate
    if ":" not in network.network and network.network not in NETWORKS:
        known = ", ".join(NETWORKS)
        allowed = f"one of {known}, or 'file.py:function' or 'module:function'"
        yield refused("network.network", network.network, allowed)
        return
    begins = {"fit.start": fit.start, "fit.copied": fit.copied, "charts": recipe.charts}
    begun, *others = [key for key, value in begins.items() if value] or [""]
    for key in others:
        yield refused(begun, begins[begun], f"it must be left out beside {key}")
    if fit.copied:
        yield from _wrong_copy(recipe)
    if begun and (network.weights or network.train):
        key = "weights" if network.weights else "train"
        allowed = f"it must be left out beside {begun}: the manifold holds the source"
        yield refused(f"network.{key}", network.model_dump()[key], allowed)
    if recipe.charts:
        yield from _wrong_charts(recipe.charts, fit)
    if fit.chart is not None and not fit.start:
        yield refused("fit.chart", fit.chart, "it needs fit.start: a manifold of charts")
    bare = not network.weights and network.train is None and not begun
    if network.network in NETWORKS and bare:
        yield (
            "network.train: is missing; without network.weights the network is trained, which"
            " needs network.train.epochs"
        )
    if bool(recipe.data.name) == bool(recipe.data.path):
        given = (recipe.data.name, recipe.data.path)
        yield refused("data", given, "it must have either a name or a path")
    if recipe.data.name not in ("", *KNOWN):
        allowed = f"one of {', '.join(KNOWN)}; or give data.path"
        yield refused("data.name", recipe.data.name, allowed)
    if recipe.data.kind not in (None, *DATA_KINDS):
        yield refused("data.kind", recipe.data.kind, f"one of {', '.join(DATA_KINDS)}")
    for key, values in (("fit.morph", fit.morph), ("evaluate.widths", listed.widths)):
        if not values:
            yield refused(key, values, "it must not be empty")
    yield from _ordered("fit.width", fit.width)
    for width in fit.widths:
        if not fit.width[0] <= width <= fit.width[1]:
            low, high = fit.width
            yield refused("fit.widths", width, f"numbers within fit.width, {low:g} to {high:g}")
    for width in fit.most:
        if not fit.width[0] <= width <= fit.width[1]:
            low, high = fit.width
            yield refused("fit.most", width, f"numbers within fit.width, {low:g} to {high:g}")
    if fit.most and fit.sandwich:
        yield refused("fit.most", fit.most, "left out with fit.sandwich, which trains the largest")
    for key, blocks in (("fit.blocks", fit.blocks), ("evaluate.blocks", listed.blocks)):
        if blocks is None:
            continue
        yield from _ordered(key, blocks)
        if blocks[1] > fit.most_blocks:
            yield refused(key, blocks, f"at most fit.most_blocks, {fit.most_blocks}")
    deep = {
        "evaluate.blocks": listed.blocks,
        "fit.shallow": fit.shallow,
        "network.named": network.named,
    }
    for key, asked in deep.items():
        if asked and not fit.blocks:
            yield refused(key, asked, "it needs fit.blocks: depth must morph")
    whole = recipe.data.stream or recipe.task != "classification"
    for key, views in (("feature", fit.feature_views), ("teacher", fit.teacher_views)):
        if views and whole:
            allowed = "0 where data.stream is true or the task is not classification"
            yield refused(f"fit.{key}_views", views, allowed)
    if fit.teacher_views and (fit.distill != "source" or fit.feature_views or not fit.augment):
        allowed = "0 unless fit.distill = 'source', fit.augment and no fit.feature_views"
        yield refused("fit.teacher_views", fit.teacher_views, allowed)
    if fit.distill_features and (fit.distill != "source" or fit.teacher_views or fit.blocks):
        allowed = "0 unless fit.distill = 'source', no fit.teacher_views and no fit.blocks"
        yield refused("fit.distill_features", fit.distill_features, allowed)
    for section, held in {"fit": fit, "network.train": network.train}.items():
        if held and held.bfloat16 and recipe.task != "classification":
            allowed = "false unless the task is classification"
            yield refused(f"{section}.bfloat16", True, allowed)
    if network.train and network.train.resolutions != (1.0,) and recipe.task != "classification":
        allowed = "[1.0] unless the task is classification"
        yield refused("network.train.resolutions", network.train.resolutions, allowed)
    smaller = fit.resolutions != (1.0,)
    if smaller and (fit.feature_views or recipe.task != "classification"):
        allowed = "[1.0] unless the task is classification without fit.feature_views"
        yield refused("fit.resolutions", fit.resolutions, allowed)
    if smaller and fit.distill == "source" and not fit.teacher_views:
        allowed = "[1.0] with fit.distill = 'source', unless fit.teacher_views is given"
        yield refused("fit.resolutions", fit.resolutions, allowed)
    if fit.blocks is None and fit.width[0] == fit.width[1]:
        yield refused("fit.width", fit.width, "a range, unless fit.blocks lets depth morph")
    yield from _representation_conflicts(recipe)


def _wrong_copy(recipe: Recipe) -> Iterator[str]:
    held = recipe.representation
    if held.kind != "mlp":
        yield refused("representation.kind", held.kind, "'mlp' beside fit.copied")
    if held.centred is not None:
        yield refused(
            "representation.centred", held.centred, "it must be left out beside fit.copied"
        )
    if not recipe.fit.regression_steps:
        yield refused("fit.regression_steps", 0, "1 or more beside fit.copied")


def _wrong_charts(charts: Sequence[ChartSection], fit: FitSection) -> Iterator[str]:
    if len(charts) > MOST_CHARTS:
        yield refused("charts", len(charts), f"at most {MOST_CHARTS}")
    try:
        check_sizes([chart.sizes for chart in charts])
    except ValueError as error:
        yield refused(
            "charts",
            [", ".join(chart.file) for chart in charts],
            str(error).removeprefix("charts: "),
        )
    last = charts[-1]
    if last.least > fit.width[0]:
        allowed = f"at most the smaller end of fit.width, {fit.width[0]:g}, in the last chart"
        yield refused("charts.least", last.least, allowed)
    if last.blocks > (fit.blocks or (0, 0))[0]:
        allowed = "at most the smaller end of fit.blocks in the last chart"
        yield refused("charts.blocks", last.blocks, allowed)


def _ordered(key: str, ends: tuple[float, float]) -> Iterator[str]:
    if ends[0] > ends[1]:
        yield refused(key, ends, "the smaller end comes first")


def _representation_conflicts(recipe: Recipe) -> Iterator[str]:
    held, fit = recipe.representation, recipe.fit
    parts: dict[str, tuple[Any, dict[str, Any], str]] = {
        "options": (KINDS[held.kind], held.options, held.kind)
    }
    for name, wrapper in WRAPPERS.items():
        if getattr(held, name) is not None:
            parts[name] = (wrapper, getattr(held, name), name)
    for part, (made, given, called) in parts.items():
        try:
            _options(made).model_validate(given)
        except ValidationError as error:
            known = f"'{called}' has {', '.join(_options(made).model_fields)}"
            for each in error.errors():
                where = f"representation.{part}"
                if each["type"] == "extra_forbidden":
                    yield f"{where}.{each['loc'][0]}: no such key; {known}"
                elif each["type"] == "missing":
                    yield f"{where}.{each['loc'][0]}: is missing; {known}"
                else:
                    yield _told(each, where)
    both = fit.blocks is not None and recipe.wide
    trained = fit.sandwich and not both
    if fit.full_weight == 0 and (trained or not held.anchored) and not recipe.charts:
        yield refused(
            "fit.full_weight",
            fit.full_weight,
            "0 leaves the source's own size untrained: it needs [representation.anchored], which keeps"
            " that size as it is, and no fit.sandwich unless width and blocks both morph",
        )


def _options(made: Any) -> type[BaseModel]:
    """The options of a representation, as its own constructor takes them by name."""
    hints, fields = typing.get_type_hints(made.__init__), {}
    for name, parameter in inspect.signature(made.__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            numeric = hints[name] is not bool
            positive = name in ("layers", "hidden", "density", "reach")
            limit = Field(gt=0) if positive else Field(ge=0) if numeric else Field()
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (Annotated[hints[name], limit], default)
    return create_model("Options", __base__=_Section, **fields)  # type: ignore[call-overload, no-any-return]
