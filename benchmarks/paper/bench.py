"""What the rows of several tables share: images, the source network, activations of its frozen part,
and manifolds that are trained once. Knows no table."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.paper.table import Results, Row, mean_row
from benchmarks.reach import raw
from neumeta import checkpoint
from neumeta.deflated import raw_bytes
from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.sample import sample
from neumeta.space import Architecture
from training import basis, data, fit, frozen, pipeline, recipe, recipe_file, regression, source
from training.task import TASKS, Task

UNSEEN = "75 % (unseen)"
GAMMAS = {"γ = 0": 1.0, "25 %": 0.75, "50 %": 0.5, UNSEEN: 0.25}
"""Compression of the hidden width of the last block, as a share of its channels that is left."""
Changes = Mapping[str, Any]
"""What is other in a recipe, as `Recipe.changed` takes it."""
TASK: Task = TASKS["classification"]


class Late(Exception):
    """The time allowed was up; what was done is kept."""


@dataclass(frozen=True)
class Setting:
    """Where things are, and whether everything shall be tiny."""

    quick: bool
    data: Path | None
    pixels: Path
    checkpoints: Path
    models: Path
    runs: Path
    results: Results
    seeds: int = 1
    deadline: float = float("inf")


class Bench:
    """The paper's scope: the hidden width of the last block of one source network, the rest frozen."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._tested: dict[str, dict[str, tuple[dict[str, Tensor], Tensor]]] = {}
        self._sources = dict[str, tuple[data.Data, basis.Traced]]()

    @cached_property
    def asked(self) -> recipe.Recipe:
        """The recipe that every row changes something of."""
        if self.setting.quick:
            return recipe_file.load("tiny").changed(
                network={"train": {"epochs": 1, "lr": 0.1, "batch": 64}},
                representation={
                    "kind": "mlp",
                    "options": {"layers": 2, "hidden": 8, "num_freq": 4, "blur": 0.5},
                    "centred": {},
                    "corrected": None,
                    "noise": 0.5,
                },
                fit={
                    "morph": ["conv3"], "width": [0.5, 1.0], "regression_steps": 2, "epochs": 0.1,
                    "feature_views": 1, "sandwich": False, "distill": "source", "smallest": 0.5,
                },
            )  # fmt: skip
        # The paper's noise, and an MLP that trains in a minute, where what ships has others; in 32 bits
        # on every machine.
        options = {"layers": 5, "hidden": 256, "num_freq": 16, "blur": 0.5}
        return recipe_file.load("cifar10-resnet20-last-block-mlp").changed(
            representation={"noise": 0.5, "samples": 1, "options": options},
            fit={
                "regression_steps": 300, "epochs": 0.5, "feature_views": 1, "smallest": 0.5,
                "widths": (), "bfloat16": False,
            },
        )  # fmt: skip

    @cached_property
    def loaded(self) -> data.Dataset:
        """The images that are trained on."""
        found = basis.dataset(self.asked, self.setting.pixels)
        assert isinstance(found, data.Dataset)
        return found

    @cached_property
    def shipped(self) -> Manifold:
        """The manifold of MLPs that ships; with `--quick` one that the tables train."""
        if self.setting.quick:
            return self.manifold(self.asked)
        return checkpoint.read(self.setting.models / "resnet20-last-block-mlp.safetensors")

    @cached_property
    def traced(self) -> basis.Traced:
        """The source network, trained, and its graph."""
        folder = self.setting.runs / "source"
        folder.mkdir(parents=True, exist_ok=True)
        net = basis.network(self.asked, self.loaded)
        found = basis.traced(self.asked, self.loaded, net)
        given = self.setting.models, folder
        net = pipeline.trained_source(self.asked, self.loaded, found.module, *given)
        return basis.Traced(net, found.graph)

    def source(self, name: str, asked: recipe.Recipe) -> tuple[data.Data, basis.Traced]:
        """The images of another recipe and its source network, trained once and kept as `name`. Its
        weights are looked for among the manifolds that ship, too."""
        if name not in self._sources:
            self._sources[name] = self._source(name, asked)
        return self._sources[name]

    def _source(self, name: str, asked: recipe.Recipe) -> tuple[data.Data, basis.Traced]:
        folder = self.setting.runs / f"source-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        loaded = basis.dataset(asked, self.setting.data)
        found = basis.traced(asked, loaded, basis.network(asked, loaded))
        ships = (self.setting.models / (asked.network.weights or " ")).exists()
        given = self.setting.models if ships else self.setting.checkpoints
        net = pipeline.trained_source(asked, loaded, found.module, given, folder)
        return loaded, basis.Traced(net, found.graph)

    def prepared(self, asked: recipe.Recipe) -> tuple[Manifold, dict[str, Tensor]]:
        """A row's manifold before its fit, and the smoothed source."""
        return pipeline.prepare(asked, self.loaded, self.traced.graph, self.traced.module)

    @cached_property
    def views(self) -> list[dict[str, Tensor]]:
        """What the frozen part gives for the training images: the same whatever the order."""
        manifold, smoothed = self.prepared(self.asked)
        first = frozen.steps(manifold.space)
        return frozen.features(
            manifold.space, smoothed, first, self.loaded, self.asked, torch.device("cpu")
        )

    @cached_property
    def tests(self) -> dict[str, data.Dataset]:
        """The test images by name: raw pixels first, where there are any."""
        if self.setting.quick:
            return {"": self.loaded}
        root = self.setting.data
        assert root is not None
        jpeg = data.load("cifar10", root)
        return {"": raw(jpeg, root), "jpeg": jpeg}

    def tested(self, manifold: Manifold) -> dict[str, tuple[dict[str, Tensor], Tensor]]:
        """What the manifold's frozen part gives for the test images, and their labels, by name. What
        ships has a frozen part of its own: its source was rounded less."""
        first, sha = frozen.steps(manifold.space), hashlib.sha256()
        for name, tensor in sorted(manifold.frozen.items()):
            sha.update(f"{first}{name}{tuple(tensor.shape)}".encode() + raw_bytes(tensor))
        frozen_digest = sha.hexdigest()
        if frozen_digest not in self._tested:
            self._tested[frozen_digest] = {}
            program = Program(manifold.space.graph, manifold.space.graph.full)
            for name, images in self.tests.items():
                parts: dict[str, list[Tensor]] = {}
                labels = []
                with torch.no_grad():
                    for x, y in images.test_batches():
                        for key, value in program.leading(manifold.frozen, x, first).items():
                            parts.setdefault(key, []).append(value)
                        labels.append(y)
                whole = {key: torch.cat(each) for key, each in parts.items()}
                self._tested[frozen_digest][name] = (whole, torch.cat(labels))
        return self._tested[frozen_digest]

    @torch.no_grad()
    def scores(
        self,
        manifold: Manifold,
        *,
        samples: int = 1,
        images: slice = slice(None),
        made: Callable[[Architecture], Mapping[str, Tensor]] | None = None,
    ) -> Row:
        """The score at every γ: on raw test images, and with ` (JPEG)` behind it on the others.

        `images` are those that are scored. `made` gives the tensors of a size, where they are not
        sampled from the manifold.
        """
        found: Row = {}
        tests = self.tested(manifold)
        for column, width in GAMMAS.items():
            architecture = manifold.space.architecture(width, extrapolate=True)
            graph = manifold.space.graph_of(architecture).folded
            program = Program(graph, manifold.space.sizes(architecture))
            own = dict(sample(manifold, architecture, samples=samples)) if made is None else {}
            weights = {**manifold.frozen, **(made(architecture) if made else own)}
            for name, (values, labels) in tests.items():
                own_values = {key: value[images] for key, value in values.items()}
                outputs = program.run(weights, own_values, first=frozen.steps(manifold.space))
                score = TASK.score(TASK.tally(TASK.read(outputs), labels[images]))
                found[f"{column} (JPEG)" if name else column] = round(score, 2)
        return found

    def source_scores(self) -> Row:
        """Of the source network itself."""
        tests = self.tests
        return {
            f"{next(iter(GAMMAS))}{' (JPEG)' if name else ''}": round(
                source.score(self.traced.module, images, TASK), 2
            )
            for name, images in tests.items()
        }

    def digest(self, asked: recipe.Recipe) -> str:
        """What a training is known by: all of its recipe that is not as by default, but its titles and
        its table. Neither a default that changes nor other images make it another one."""
        told = asked.model_dump(mode="json", exclude_defaults=True)
        told = {k: v for k, v in told.items() if k not in ("title", "evaluate", "name", "file")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def train(self, asked: recipe.Recipe) -> Row:
        """The scores of this recipe's manifold: from an earlier row that it made, or its run, or
        trained now. Raises Late when the time allowed is up; the run goes on from there."""
        digest = self.digest(asked)
        kept = self.setting.results.trained(digest)
        if kept is not None:
            return kept
        folder = self.setting.runs / digest
        path = folder / "row.json"
        if path.exists():
            return dict(json.loads(path.read_text()))
        manifold, smoothed = self.prepared(asked)
        goal = regression.targets(manifold, smoothed, self.loaded, asked.seed)
        self.fit(asked, manifold, smoothed, self.loaded, folder, self.views)
        row = {
            **self.scores(manifold),
            "mean": 0.0,
            "error": round(regression.error(manifold, goal), 4),
            "total variation": round(manifold.about["permutation"]["total_variation"], 2),
            "parameters, M": round(stored(manifold) / 1e6, 3),
            "minutes": manifold.about["minutes"],
            "training": digest,
        }
        row["mean"] = round(float(np.mean([row[column] for column in GAMMAS])), 2)
        path.write_text(json.dumps(row))
        return row

    def repeated(
        self, asked: recipe.Recipe, measure: Callable[[recipe.Recipe], Row] | None = None
    ) -> Row:
        """The mean of this recipe's rows over the seeds from its own on. Those trained here
        share frozen activations and the source. Raises Late."""
        seeds = range(asked.seed, asked.seed + self.setting.seeds)
        return mean_row([(measure or self.train)(asked.changed(seed=seed)) for seed in seeds])

    def fit(
        self,
        asked: recipe.Recipe,
        manifold: Manifold,
        smoothed: Mapping[str, Tensor],
        loaded: data.Data,
        folder: Path,
        views: list[dict[str, Tensor]] | None = None,
    ) -> None:
        """Train a manifold in its folder and keep it there, with the minutes of a core that this took.

        Raises Late when the time allowed is up; the next run goes on from there.
        """
        began = time.process_time()
        left = (self.setting.deadline - time.monotonic()) / 60
        if left <= 0 or not fit.fit(
            manifold, smoothed, loaded, TASKS[asked.task], asked, folder, resume=True,
            max_minutes=left, views=views,
        ):  # fmt: skip
            raise Late
        manifold.about["minutes"] = round((time.process_time() - began) / 60, 2)
        checkpoint.write(manifold, folder / "manifold.safetensors")

    def manifold(self, asked: recipe.Recipe) -> Manifold:
        """The trained manifold of this recipe."""
        path = self.setting.runs / self.digest(asked) / "manifold.safetensors"
        if not path.exists():
            # Another machine has trained it for its row: here it is trained for its weights.
            forgetful = replace(self.setting, results=Results(self.setting.runs / "none"))
            again = Bench(forgetful)
            again.__dict__.update(loaded=self.loaded, traced=self.traced, views=self.views)
            again.train(asked)
        return checkpoint.read(path)


def stored(manifold: Manifold) -> int:
    """Numbers that are stored for what morphs."""
    return sum(value.numel() for value in manifold.representation.state_dict().values())
