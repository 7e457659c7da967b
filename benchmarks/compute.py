"""Steps that compute: a small ResNet on CIFAR shapes, against bare DDP as people write it and
Accelerate, taking turns in one run.

    python benchmarks/compute.py                     # 2 ranks on the CPU, one thread each

128 samples a rank and step. Every contender has ranks of its own. "plain" switches ddp_kit's
defaults for speed off.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from turns import compare, serve, show

import ddp_kit
from ddp_kit import LossSum, Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.build import build
from ddp_kit.training.step import train_step

BATCH = 128
CONTENDERS = [
    "bare DDP",
    "ddp_kit plain",
    "ddp_kit defaults",
    "ddp_kit --precision bf16",
    "bare DDP bf16",
    "Accelerate",
]
TARGETS = {"ddp_kit plain": 1.00, "ddp_kit defaults": 0.65, "ddp_kit --precision bf16": 0.38}


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential()
            if inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), *head)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(4096, 3, 32, 32, generator=generator),
        torch.randint(10, (4096,), generator=generator),
    )


def by_hand(*, bf16: bool = False, accelerate: bool = False) -> None:
    """The loop as people write it; the input is in memory for all contenders."""
    torch.set_num_threads(1)
    inputs, labels = data().tensors
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        net, optimizer = accelerator.prepare(net, optimizer)
        backward: Callable[[torch.Tensor], None] = accelerator.backward
    else:
        dist.init_process_group("gloo")
        net, backward = DistributedDataParallel(net), torch.Tensor.backward
    at = dist.get_rank() * BATCH

    def run(steps: int) -> None:
        nonlocal at
        for _ in range(steps):
            chosen = torch.arange(at, at + BATCH) % len(inputs)
            at += BATCH * dist.get_world_size()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = cross_entropy(net(inputs[chosen]), labels[chosen])
            backward(loss)
            optimizer.step()

    serve(run)
    for name in (
        "reducer",
        "logger",
        "process_group",
    ):  # a gloo group that outlives its destruction aborts the process
        delattr(net, name)
    dist.destroy_process_group()


def loss(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> LossSum:
    images, labels = batch
    return LossSum(cross_entropy(net(images), labels, reduction="sum"), len(labels))


def ours(*, tuning: bool, precision: str = "fp32") -> None:
    """ddp_kit's step with its own loader."""
    with ddp_kit.process_group(device="cpu", threads=1, tuning=tuning) as group:
        settings = Settings(
            global_batch=BATCH * group.world_size,
            max_steps=10**9,
            precision=precision,
            device="cpu",
            tuning=tuning,
        )

        def optimizer(net: nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        made = build(
            Recipe(model=model, loss=loss, optimizer=optimizer, train_data=data), settings, group
        )
        batches = made.feed.batches(start=0, end=10**9)

        def run(steps: int) -> None:
            for _ in range(steps):
                train_step(made.training, next(batches))

        serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--contender", choices=CONTENDERS)
    options = parser.parse_args()
    if options.contender is None:
        times = compare(
            CONTENDERS, script=__file__, world_size=2, rounds=options.rounds, steps=options.steps
        )
        print(
            f"2 ranks, {BATCH} samples a rank, torch {torch.__version__}, "
            f"{options.rounds} rounds of {options.steps} steps"
        )
        show(times, targets=TARGETS)
    elif options.contender.startswith("ddp_kit"):
        ours(
            tuning="plain" not in options.contender,
            precision="bf16" if "bf16" in options.contender else "fp32",
        )
    else:
        by_hand(bf16="bf16" in options.contender, accelerate=options.contender == "Accelerate")


if __name__ == "__main__":
    sys.exit(main())
