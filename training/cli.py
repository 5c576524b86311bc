"""`neumeta-train RECIPE`: from images to a manifold, or the line that says why not.

Flags and messages; the stages are in `pipeline.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from neumeta import atomic
from training import basis, modules, networks, pipeline, recipe, recipe_file
from training.divergence import Diverged
from training.explain import explain
from training.state import BadState
from training.task import TASKS

DONE, BAD_INPUT, STOPPED, INTERRUPTED = 0, 2, 3, 130
ALIKE = (recipe.BadRecipe, BadState, Diverged, pipeline.Stopped, KeyboardInterrupt)
"""What every process of a run meets if one does; so is whatever comes before they know each other."""
PATIENCE = 20.0
"""Seconds that another process waits for the first one to tell such an error."""


def main(argv: list[str] | None = None) -> int:
    """Run one recipe; returns the exit code: 0 done, 2 bad input or no room for the result, 3 stopped
    by --max-minutes, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    threading.excepthook = _in_a_thread
    try:
        return _run(arguments)
    except KeyboardInterrupt as error:
        return _say("interrupted; --resume goes on", INTERRUPTED, error)
    except pipeline.Stopped as error:
        told = f"stopped after {arguments.max_minutes:g} minutes; --resume goes on"
        return _say(told, STOPPED, error)
    except OSError as error:
        told = f"{error.filename or 'a file of this run'}: {error.strerror}"
        return _say(told if error.strerror else str(error), BAD_INPUT, error)
    except ValueError as error:
        return _say(str(error), BAD_INPUT, error)
    finally:
        if dist.is_initialized() and "RANK" in os.environ:
            dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neumeta-train", description=__doc__, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("recipe", nargs="?", help="a built-in recipe's name, or a .toml file")
    what.add_argument(
        "--explain",
        metavar="NETWORK",
        help="print what can be morphed in a network ('mynet.py:build', 'torchvision.models:resnet18'"
        " or a built-in one), and train nothing",
    )
    parser.add_argument(
        "--shape", type=_shape, default=(3, 32, 32), help="of its images: channels,height,width"
    )
    parser.add_argument(
        "--folder",
        "--run",
        type=Path,
        help="folder of this run (default runs/RECIPE); torchrun takes --run for its own",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the data sets (default $NEUMETA_DATA or data)"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of public checkpoints (default DATA/../checkpoints)",
    )
    parser.add_argument(
        "--out", type=Path, help="the manifold's file (default FOLDER/manifold.safetensors)"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        metavar="N",
        help="in place of the recipe's; the run is then named RECIPE-seed-N",
    )
    parser.add_argument("--resume", action="store_true", help="go on where this run stopped")
    parser.add_argument("--max-minutes", type=_minutes, default=math.inf)
    return parser


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:30]} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not three numbers from 1 on, like 3,32,32")
    return sizes


def _explain(name: str, shape: tuple[int, ...]) -> int:
    built = networks.BUILT_IN.get(name)
    net = built(10, shape[0]) if built else modules.resolve(name)
    print(explain(net, shape))
    return DONE


def _say(message: str, code: int, error: BaseException) -> int:
    alike = isinstance(error, ALIKE) or not dist.is_initialized()
    if alike and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        if code != INTERRUPTED:
            # The machine's first process meets it too, and ends this one once it has told it. Were
            # this the first one to end, that one would be ended before it could.
            time.sleep(PATIENCE)
        return code
    # In one write, so that the lines of several processes do not mix.
    print("".join(f"neumeta-train: {line}\n" for line in message.splitlines()),
          end="", file=sys.stderr, flush=True)  # fmt: skip
    return code


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer raises a full disk's error again in the main thread, which tells it.
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.explain:
        return _explain(arguments.explain, arguments.shape)
    began = time.monotonic()
    asked = recipe_file.load(arguments.recipe)
    if arguments.seed is not None:
        asked = asked.seeded(arguments.seed)
    folder: Path = arguments.folder or Path("runs") / asked.name
    out: Path = arguments.out or folder / "manifold.safetensors"
    for path in (folder / "recipe.json", out):
        atomic.check(path)
    # Before the processes meet: what is wrong with the images is the same for all of a machine.
    loaded = basis.dataset(asked, arguments.data)
    if "RANK" in os.environ and not dist.is_initialized():
        # While the first process trains the source or evaluates, the others wait for it.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    root = arguments.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    made = pipeline.run(
        asked,
        loaded,
        arguments.checkpoints or root.parent / "checkpoints",
        folder,
        out,
        resume=arguments.resume,
        max_minutes=arguments.max_minutes,
    )
    if made is None:  # the first process tells it
        return DONE
    unit = TASKS[asked.task].unit
    for row in made.rows:
        print(
            f"width {row['width']:<5g} depth {row['depth']!s:<12}"
            f" {row['parameters']:>8} parameters  {row['metric']} {row['score']:.2f} {unit}"
        )
    print(
        f"source {made.source:.2f} {unit}; {out} {out.stat().st_size} bytes;"
        f" {time.monotonic() - began:.0f} s"
    )
    return DONE


if __name__ == "__main__":
    sys.exit(main())
