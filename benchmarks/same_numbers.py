"""Every strategy follows ddp: losses of 50 steps of recipes/char_lm.py, clipped at half the median
gradient norm, EMA on. Prints a table.

    python benchmarks/same_numbers.py --data-root data

Real commands under torchrun. A figure is the largest difference of a step's training loss, and that
of the evaluation of the averaged weights at the end, from ddp's on as many ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "char_lm.py"
FLAGS = [
    "--layers",
    "2",
    "--epochs",
    "0",
    "--max-steps",
    "50",
    "--log-every",
    "1",
    "--ema",
    "0.9",
    "--lr",
    "1e-4",
    "--threads",
    "1",
]
CHOICES = {
    "ddp": [],
    "zero1": ["--strategy", "zero1"],
    "fsdp": ["--strategy", "fsdp", "--fsdp.wrap", "Block"],
    **{
        f"deepspeed {stage}": ["--strategy", "deepspeed", "--deepspeed.stage", str(stage)]
        for stage in (1, 2, 3)
    },
    "ddp, comm bf16": ["--comm", "bf16"],
    "ddp, comm fp16": ["--comm", "fp16"],
}
LOWER = {
    "ddp, precision bf16": ["--precision", "bf16"],
    "fsdp, precision bf16": [*CHOICES["fsdp"], "--precision", "bf16"],
}
Found = tuple[list[float], float, list[float]]


def run(flags: list[str], folder: Path, *, ranks: int, data_root: str, clip: float) -> Found:
    """Returns training losses, the last evaluation's loss and the gradient norms."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        "--standalone",
        "-m",
        "ddp_kit.train",
    ]
    given = [
        str(RECIPE),
        *FLAGS,
        "--data-root",
        data_root,
        "--grad-clip",
        str(clip),
        "--run-dir",
        str(folder),
        *flags,
    ]
    done = subprocess.run(
        [*launcher, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(given)} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}"
        )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    last = [record["loss"] for record in records if record["kind"] == "eval"][-1]
    return [record["loss"] for record in train], last, [record["grad_norm"] for record in train]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data-root", default="data", help="folder that holds tinyshakespeare.txt")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    given = parser.parse_args()
    choices = {
        name: flags
        for name, flags in CHOICES.items()
        if "deepspeed" not in name or find_spec("deepspeed")
    }
    rows = {name: "" for name in [*choices, *LOWER] if name != "ddp"}
    with tempfile.TemporaryDirectory() as temporary:
        for ranks in given.ranks:
            free = run(
                [],
                Path(temporary) / f"free-{ranks}",
                ranks=ranks,
                data_root=given.data_root,
                clip=1e9,
            )
            clip = statistics.median(free[2]) / 2
            found: dict[str, Found] = {}
            for name, flags in (choices | LOWER).items():
                folder = Path(temporary) / f"{name}-{ranks}".replace(" ", "-")
                found[name] = run(flags, folder, ranks=ranks, data_root=given.data_root, clip=clip)
                base = found["ddp, precision bf16" if name == "fsdp, precision bf16" else "ddp"]
                apart = max(abs(a - b) for a, b in zip(found[name][0], base[0], strict=True))
                if name in rows:
                    rows[name] += f" {apart:.1e} | {abs(found[name][1] - base[1]):.1e} |"
    print("| |" + "".join(f" {ranks} ranks: training | evaluation |" for ranks in given.ranks))
    print("|---|" + "---|---|" * len(given.ranks))
    for name, row in rows.items():
        print(f"| {name} |{row}")


if __name__ == "__main__":
    main()
