"""A recipe: every number of one published result, one section per stage, checked as a whole.

Knows no stage's work (each stage reads its own section) and reads no file. One entrance for files,
changes and what a checkpoint holds: `parse`. All problems that can be seen together are told together.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
)
from pydantic_core import ErrorDetails

from neumeta.representation import KINDS, MOST_CHARTS, WRAPPERS, check_sizes
from training.data import KINDS as DATA_KINDS
from training.data import KNOWN
from training.networks import BUILT_IN as NETWORKS
from training.sections import (
    ChartSection,
    DataSection,
    EvaluateSection,
    FitSection,
    NetworkSection,
    OrderSection,
    RepresentationSection,
    Section,
)


class BadRecipe(ValueError):
    """A recipe that cannot be run: one line for each problem, with the file, the key, the value given
    and what is allowed."""

    def __init__(self, file: str, problems: list[str]) -> None:
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))


class Recipe(Section):
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
        return parse(changed(self.model_dump(), changes), self.file)

    def seeded(self, seed: int) -> Recipe:
        """This recipe with another seed, under a name of its own. Raises BadRecipe."""
        return self.changed(seed=seed, name=f"{self.name}-seed-{seed}")


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


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a recipe with others in place of some: a section's other keys stay."""
    made = dict(values)
    for key, value in changes.items():
        inside = isinstance(value, Mapping) and isinstance(made.get(key), dict)
        made[key] = {**made[key], **value} if inside else value
    return made


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
        held = next(each for each in hints if inspect.isclass(each) and issubclass(each, Section))
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
    low, high = fit.width
    for key, widths in (("fit.widths", fit.widths), ("fit.most", fit.most)):
        for width in widths:
            if not low <= width <= high:
                yield refused(key, width, f"numbers within fit.width, {low:g} to {high:g}")
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
    return create_model("Options", __base__=Section, **fields)  # type: ignore[call-overload, no-any-return]
