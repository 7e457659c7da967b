"""From the command to an accuracy: recipes/cifar_fast.py against the plain recipes/cifar.py --model
resnet, taking turns over seeds.

    python benchmarks/time_to_accuracy.py --data-root data

Real commands: `torchrun --nproc_per_node=2`, one thread a rank. The clock starts before the command
does, so that imports, evaluations and saves count; it stops at the first evaluation of the
validation images that reaches the target. Both run to the end of their schedules.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ddp_kit.cli.plot import Point, draw

RECIPES = Path(__file__).parents[1] / "recipes"
# Long enough to get there: with 10 epochs it ends at 84.4 %, and the recipe's default, ResNet-8 of
# 16 channels, stays below.
PLAIN = "--model resnet --width 32 --blocks 2 --epochs 12 --precision bf16"
TARGET_RATIO = 3.0  # the plain recipe should take so many times as long
POLL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data-root", default="data", help="folder that holds CIFAR-10")
    parser.add_argument(
        "--target", type=float, default=0.85, help="accuracy of the validation images"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of each recipe, with seeds 0, 1, ..."
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plain", default=PLAIN, help="flags of recipes/cifar.py")
    parser.add_argument("--fast", default="", help="flags of recipes/cifar_fast.py")
    parser.add_argument(
        "--runs", default="", help="where the run directories stay; empty: they do not"
    )
    given = parser.parse_args()
    flags = {"cifar": shlex.split(given.plain), "cifar_fast": shlex.split(given.fast)}
    curves: dict[str, list[list[Point]]] = {name: [] for name in flags}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.runs or temporary)
        for seed in range(given.seeds):
            for name, own in flags.items():
                arguments = ["--data-root", given.data_root, "--seed", str(seed), *own]
                curves[name].append(
                    curve(name, arguments, ranks=given.ranks, run_dir=folder / f"{name}-{seed}")
                )
                said = seconds_to(given.target, curves[name][-1])
                print(
                    f"{name} seed {seed}: {said:.1f} s to {given.target:.0%}, "
                    f"{curves[name][-1][-1][1]:.1%} at the end",
                    flush=True,
                )
    show(curves, target=given.target)


def curve(name: str, arguments: Sequence[str], *, ranks: int, run_dir: Path) -> list[Point]:
    """Runs a recipe.

    Returns (seconds since the command, accuracy) of its evaluations, as they appear in
    metrics.jsonl.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--standalone",
        "-m",
        "ddp_kit.train",
    ]
    command = [*launcher, str(RECIPES / f"{name}.py"), *arguments, "--run-dir", str(run_dir)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    points: list[Point] = []
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            time.sleep(POLL_S)
            found = accuracies(run_dir / "metrics.jsonl")
            points += [(time.perf_counter() - begin, accuracy) for accuracy in found[len(points) :]]
        if process.returncode:
            raise SystemExit(
                f"{shlex.join(command)} ended with exit code {process.returncode}:\n"
                f"{process.stderr.read()}"
            )
    return points


def accuracies(path: Path) -> list[float]:
    """Returns the accuracy of each evaluation so far; a line that is still being written is left
    for the next look.
    """
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record["accuracy"] for record in map(json.loads, lines) if record["kind"] == "eval"]


def seconds_to(target: float, points: Sequence[Point]) -> float:
    """Returns the seconds to the first evaluation that reached the target; infinity if none did."""
    return next((seconds for seconds, accuracy in points if accuracy >= target), math.inf)


def show(curves: dict[str, list[list[Point]]], *, target: float) -> None:
    """Prints accuracy against seconds, the seconds to the target with their spread, and the ratio,
    seed by seed.
    """
    marks = {
        letter: [point for points in curves[name] for point in points]
        for letter, name in (("p", "cifar"), ("f", "cifar_fast"))
    }
    frame = draw([], marks, width=100, height=16, across="seconds")
    print("validation accuracy; p: recipes/cifar.py, f: recipes/cifar_fast.py", *frame, sep="\n")
    for name, own in curves.items():
        times = [seconds_to(target, points) for points in own]
        last = [points[-1][1] for points in own]
        print(
            f"{name + '.py':14} seconds to {target:.0%}: "
            f"median {statistics.median(times):.1f} ({min(times):.1f}-{max(times):.1f}), "
            f"at the end {statistics.median(last):.1%} ({min(last):.1%}-{max(last):.1%}), "
            f"{len(own)} seeds"
        )
    pairs = zip(curves["cifar"], curves["cifar_fast"], strict=True)
    ratios = [seconds_to(target, plain) / seconds_to(target, fast) for plain, fast in pairs]
    print(
        f"plain / fast: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f}-{max(ratios):.2f})  target {TARGET_RATIO:.2f}"
    )
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
