"""Every task, and data that is read from disk, goes through the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neumeta import checkpoint
from tests.support.images import classes, write
from training import basis, pipeline, recipe

SMALL: dict[str, Any] = {
    "name": "small",
    "title": "small",
    "fit": {"width": [0.5, 1.0], "epochs": 1.0, "batch": 4, "sandwich": True, "distill": "inplace"},
    "representation": {"corrected": {}},
    "evaluate": {"widths": [1.0, 0.5]},
}
TRAIN = {"epochs": 1, "batch": 4, "lr": 1e-4}


def run(folder: Path, **sections: Any) -> pipeline.Result:
    asked = recipe.parse({**SMALL, **sections}, str(folder / "small.toml"))
    loaded = basis.dataset(asked, folder)
    made = pipeline.run(asked, loaded, folder, folder / "run", folder / "out.safetensors")
    assert made is not None
    return made


@pytest.mark.parametrize("task", ["segmentation", "generation"])
def test_a_task_trains_fits_scores_and_names_its_metric(tmp_path: Path, task: str) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 3 if task == "segmentation" else 1), np.uint8)
    arrays = {"train_images": images, "test_images": images[:4]}
    if task == "segmentation":
        masks = (images[..., 0] > 127).astype(np.int64)
        arrays |= {"train_labels": masks, "test_labels": masks[:4]}
    np.savez(tmp_path / "set.npz", **arrays)
    network = "unet" if task == "segmentation" else "vae"
    more = {} if task == "segmentation" else {"mean": [0.0], "std": [1.0]}
    made = run(
        tmp_path,
        task=task,
        network={"network": network, "train": TRAIN},
        data={"path": "set.npz", "calibration": 4, **more},
    )
    held = checkpoint.read(tmp_path / "out.safetensors")
    metric = {"segmentation": "mean IoU", "generation": "ELBO"}[task]
    assert (held.contract.task, held.contract.metric) == (task, metric)
    assert [row["metric"] for row in made.rows] == [metric, metric]
    assert held.space.name == network and all(np.isfinite(row["score"]) for row in made.rows)


def test_class_folders_are_streamed_from_disk(tmp_path: Path) -> None:
    write(tmp_path / "birds", classes("wren", "owl", each=6))
    made = run(
        tmp_path,
        network={"network": "lenet", "train": TRAIN},
        data={"path": "birds", "stream": True, "workers": 1, "size": 16,
              "mean": [0.5] * 3, "std": [0.25] * 3},
    )  # fmt: skip
    assert (
        len(made.rows) == 2 and checkpoint.read(tmp_path / "out.safetensors").digest == made.digest
    )
