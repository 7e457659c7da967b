"""From the command to the first optimizer step: ddp_kit under torchrun and under its own launcher,
against a bare script under torchrun.

    python benchmarks/startup.py

2 ranks, the small MLP of benchmarks/overhead.py, one thread a rank. The clock starts before the
command does; both sides write the time when rank 0 has taken its first step.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import show

BARE = """
import os, time, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
net = nn.Sequential(*layers)
wrapped = DistributedDataParallel(net)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
data = TensorDataset(torch.randn(6000, 784), torch.randint(10, (6000,)))
inputs, labels = next(iter(DataLoader(data, batch_size=64, sampler=DistributedSampler(data))))
nn.functional.cross_entropy(wrapped(inputs), labels).backward()
optimizer.step()
if dist.get_rank() == 0:
    print(f"first step {time.time()}\\n", end="", flush=True)
del wrapped
dist.destroy_process_group()
"""
RECIPE = """
import time
from dataclasses import dataclass
import torch
from torch import nn
from torch.utils.data import TensorDataset
import ddp_kit

@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    global_batch: int = 128
    max_steps: int = 1

class FirstStep:
    def on_start(self, model): pass
    def on_step(self, step): print(f"first step {time.time()}\\n", end="", flush=True)
    def on_evaluation(self, step, metrics): pass
    def on_end(self, reason): pass

def loss(net, batch):
    inputs, labels = batch
    total = nn.functional.cross_entropy(net(inputs), labels, reduction="sum")
    return ddp_kit.LossSum(total, len(labels))

def recipe(settings):
    return ddp_kit.Recipe(
        model=lambda: nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        loss=loss,
        optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        train_data=lambda: TensorDataset(torch.randn(6000, 784), torch.randint(10, (6000,))),
        callbacks=[FirstStep()],
    )
"""


def first_step(command: list[str], folder: Path) -> float:
    """Returns the seconds from the command to its line "first step"."""
    begin = time.time()
    environ = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    steps = [float(found) for found in re.findall(r"first step (\d+\.\d+)", done.stdout)]
    # What comes after the step does not count: a bare gloo script may abort when one rank leaves
    # before the other.
    if not steps:
        raise SystemExit(done.stdout + done.stderr)
    return steps[0] - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torchrun = ["torch.distributed.run", "--nproc_per_node=2"]
    commands = {
        "bare script, torchrun": [*torchrun, "bare.py"],
        "ddp_kit.train, torchrun": [*torchrun, "-m", "ddp_kit.train", "recipe.py"],
        "ddp-kit run": ["ddp_kit.cli.main", "run", "--nproc-per-node", "2", "recipe.py"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bare.py").write_text(BARE)
        (folder / "recipe.py").write_text(RECIPE)
        for round_ in range(rounds + 1):
            for contender, command in commands.items():
                seconds = first_step(command, folder)
                if round_:  # the first round fills the page cache
                    times[contender].append(seconds)
    show(times, unit="s", targets={"ddp_kit.train, torchrun": 1.05, "ddp-kit run": 0.75})


if __name__ == "__main__":
    main()
