"""`neumeta-train RECIPE`: the whole pipeline, stage by stage, each stage's result kept in the run.

source -> channel order -> representation fit -> statistics -> evaluation -> checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from neumeta import checkpoint
from neumeta.manifold import Manifold, representation
from neumeta.network import Network
from training import cliques, data, evaluate, fit, order, plots, recipe, source, statistics
from training.divergence import check_tensors
from training.folded import fold, network_from, reorder
from training.imported import import_resnet_cifar


def main(argv: list[str] | None = None) -> int:
    """Run one recipe; returns the exit code (0 done, 2 bad input, 3 stopped by --max-minutes)."""
    parser = argparse.ArgumentParser(prog="neumeta-train", description=__doc__)
    parser.add_argument("recipe", help="a built-in recipe's name, or a .toml file")
    parser.add_argument("--run", type=Path, help="folder of this run (default runs/RECIPE)")
    parser.add_argument(
        "--data", type=Path, help="folder of the data sets (default $NEUMETA_DATA or data)"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of public checkpoints (default DATA/../checkpoints)",
    )
    parser.add_argument("--out", type=Path, help="the manifold (default RUN/manifold.safetensors)")
    parser.add_argument("--resume", action="store_true", help="go on where this run stopped")
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"neumeta-train: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    asked = recipe.load(arguments.recipe)
    run: Path = arguments.run or Path("runs") / asked.name
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank() if dist.is_initialized() else 0
    if (run / "recipe.json").exists() and not arguments.resume and rank == 0:
        raise ValueError(f"{run} holds an earlier run: add --resume, or choose another --run")
    run.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()
    written = json.dumps(asked.as_dict(), indent=1, sort_keys=True)
    if arguments.resume and (run / "recipe.json").exists():
        if (run / "recipe.json").read_text() != written:
            raise ValueError(f"{run} was started with another recipe: choose another --run")
    elif rank == 0:
        (run / "recipe.json").write_text(written)
    began = time.monotonic()
    loaded = data.load(asked.data, arguments.data)
    root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    net = trained_source(asked, loaded, arguments.checkpoints or root.parent / "checkpoints", run)
    manifold, targets, smoothed = prepare(asked, loaded, net)
    before = source.accuracy(net, loaded.test_images, loaded.test_labels, loaded)
    if torch.cuda.is_available():
        manifold.representation.to(f"cuda:{rank % torch.cuda.device_count()}")
    done = fit.fit(
        manifold,
        targets,
        smoothed,
        loaded,
        asked,
        run,
        resume=arguments.resume,
        max_minutes=arguments.max_minutes,
    )
    if not done:
        print(f"stopped after {arguments.max_minutes} minutes; --resume goes on", file=sys.stderr)
        return 3
    manifold.representation.cpu()
    if rank > 0:
        return 0
    if asked.norm:
        statistics.measure_statistics(manifold, loaded, asked)
    rows = evaluate.evaluate(manifold, loaded, asked)
    manifold.about.update(
        title=asked.title,
        recipe=asked.as_dict(),
        source={
            "kind": asked.source,
            "file": asked.source_checkpoint,
            "accuracy": round(before, 2),
        },
        data={
            "name": loaded.name,
            "sha256": loaded.digest(),
            "test_images": len(loaded.test_labels),
        },
        evaluation=rows,
        torch=torch.__version__,
    )
    out: Path = arguments.out or run / "manifold.safetensors"
    digest = checkpoint.write(manifold, out)
    report = {"source_accuracy": round(before, 2), "evaluation": rows, "checkpoint": digest}
    (run / "evaluation.json").write_text(json.dumps(report, indent=1))
    plots.evaluation(rows, asked, before, run / "evaluation.svg")
    for row in rows:
        print(
            f"width {row['width']:<5g} depth {row['depth']!s:<12}"
            f" {row['parameters']:>8} parameters  {row['accuracy']:.2f} %"
        )
    print(
        f"source {before:.2f} %; {out} {out.stat().st_size} bytes; {time.monotonic() - began:.0f} s"
    )
    return 0


def trained_source(
    asked: recipe.Recipe, loaded: data.Dataset, checkpoints: Path, run: Path
) -> Network:
    """The source network of a recipe: kept in the run once it is trained or fine-tuned."""
    family = asked.space.table
    kept = run / "source.safetensors"
    sizes = family.full_sizes(asked.space.depth, len(loaded.classes))
    sizes["image"] = loaded.train_images.shape[1]
    if kept.exists():
        return source.restore(kept, asked.family, asked.space.depth, sizes)
    if asked.source == "train":
        torch.manual_seed(asked.seed)
        net = Network(asked.family, asked.space.depth, sizes, norm=True)
    else:
        path = checkpoints / asked.source_checkpoint
        if not path.exists():
            raise FileNotFoundError(
                f"source checkpoint {path} is not there: it is published at"
                " https://github.com/akamaster/pytorch_resnet_cifar10; see --checkpoints"
            )
        net = import_resnet_cifar(path, asked.space.depth, len(loaded.classes))
    if asked.source != "import":
        source.train(
            net,
            loaded,
            epochs=asked.source_epochs,
            lr=asked.source_lr,
            batch=asked.source_batch,
            seed=asked.seed,
            state=run / "source.pt",
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        source.save(net, kept)
    return net


def prepare(
    asked: recipe.Recipe, loaded: data.Dataset, net: Network
) -> tuple[Manifold, dict[str, Tensor], Network]:
    """The untrained manifold, its targets (smoothed source tensors) and the smoothed network."""
    check_tensors("source", net.state_dict())
    space = asked.space
    folded = fold(net)
    found = cliques.cliques(space.table, space.depth)
    axes = [axis for axis in found if space.morphs(axis)]
    orders = order.order(folded, found, asked.permutation, seed=asked.seed, axes=axes)
    # Frozen axes keep their order, so that the source's own prefix stays what it was.
    smooth = order.apply(folded, found, orders)
    smoothed = network_from(smooth, asked.family, space.depth)
    torch.manual_seed(asked.seed)
    model = representation(asked.representation, space, asked.options, norm=asked.norm)
    frozen, targets = {}, {}
    raw = reorder(net, orders) if asked.norm else {}
    for layer in space.table.layers(space.depth):
        if not space.morphing(layer):
            for kind in ("weight", "bias"):
                frozen[f"{layer.name}.{kind}"] = smooth[f"{layer.name}.{kind}"]
        elif asked.norm and layer.norm:
            targets[f"{layer.name}.weight"] = raw[f"{layer.name}.weight"]
            targets[f"{layer.name}.gamma"] = raw[f"{layer.norm}.weight"]
            targets[f"{layer.name}.beta"] = raw[f"{layer.norm}.bias"]
        else:
            for kind in ("weight", "bias"):
                targets[f"{layer.name}.{kind}"] = smooth[f"{layer.name}.{kind}"]
    tv: dict[str, Any] = {
        "strategy": asked.permutation,
        "total_variation_before": order.total_variation(folded),
        "total_variation": order.total_variation(smooth),
    }
    manifold = Manifold(
        space,
        model,
        asked.representation,
        asked.options,
        asked.norm,
        asked.noise,
        asked.samples,
        asked.scale,
        {"mean": loaded.mean, "std": loaded.std},
        list(loaded.classes),
        frozen,
        about={"permutation": tv},
    )
    return manifold, targets, smoothed
