"""What a recipe says, section by section: its keys, what each one means, its units and its limits.

Knows no rule between two sections and no file.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from neumeta.representation import MOST_STEPS, WRAPPERS, Sizes
from neumeta.space import MAX_WIDTH, MOST_BLOCKS

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


class Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Training(Section):
    """How the source network is trained: epochs of the training set, the peak of the learning rate,
    images per step, `resolutions` and `bfloat16` as in [fit]."""

    epochs: Annotated[int, Field(ge=0)]
    lr: Rate = 0.05
    batch: Count = 128
    resolutions: Annotated[tuple[Resolution, ...], Field(min_length=1)] = (1.0,)
    bfloat16: bool = False


class NetworkSection(Section):
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


class DataSection(Section):
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


class OrderSection(Section):
    """The channel order."""

    strategy: Literal["none", "random", "layer-greedy", "layer-2opt", "mshp"] = "mshp"


class RepresentationSection(Section):
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


class FitSection(Section):
    """Algorithm 2. Units: rates per step, epochs of the training set, widths as factors.

    `morph` are patterns over axis names; `width` and `blocks` the trained ranges, `most_blocks` a bound
    beyond them. `folded`: the representation learns the source without its batch norms, which its
    layers took up (the paper's folded training; what an mlp and an integral do unless told
    otherwise); else with them, on statistics of each batch. Before any image,
    `regression_steps` on the smoothed weights. `widths`: the pool that random widths come from
    (empty: the whole range); `most`: the largest that is trained of each group
    (empty: the range's), for a chart that is bounded likewise: the manifold still claims all of
    `width`. `sandwich`: each step trains the largest, the smallest and one random architecture; where
    width and depth both morph, the smallest, one of a random width, one of a random depth (at full
    width as often as not), and the largest if `full_weight` counts it. `smallest`: the
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
    if type(value) in (int, float):
        return (value,)
    if value is None or isinstance(value, list | tuple):
        return value
    raise ValueError("it must be a number or a list of numbers")


class ChartSection(Section):
    """One of several manifolds that were trained apart and are put together: its `file`, or several
    whose mean it is (cycles of one training, or trainings from one start), and the sizes that are
    drawn from it: all groups have from `least` to `most` of the source's width, all stages from
    `blocks` to `most_blocks` blocks (lists: of each group, of each stage). Of a file of charts,
    `chart` says which one it is; beside it may stand a manifold that went on from that chart
    (`fit.chart`). `steps`: of its numbers, from zero to the largest of a row; fewer are fewer bytes."""

    file: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_one_or_more)]
    chart: Annotated[int, Field(ge=0)] | None = None
    least: Width
    blocks: Annotated[int, Field(ge=0)] = 0
    most: Annotated[tuple[Width, ...] | None, BeforeValidator(_each)] = None
    most_blocks: Annotated[tuple[Count, ...] | None, BeforeValidator(_each)] = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = MOST_STEPS

    @property
    def sizes(self) -> Sizes:
        """The sizes, as the representation has them."""
        given = {key: getattr(self, key) for key in ("most", "most_blocks")}
        bounds = {key: held for key, held in given.items() if held is not None}
        return Sizes(self.least, self.blocks, **bounds)


class EvaluateSection(Section):
    """The sizes of the evaluation table, also outside the trained ranges."""

    widths: tuple[Width, ...] = (1.0,)
    blocks: Range | None = None
