"""Each strategy beside the same thing written by hand in bare torch (or DeepSpeed): time of a step and peak memory of a rank.

    python benchmarks/strategies.py                     # ddp, zero1, fsdp
    python benchmarks/strategies.py --strategies deepspeed

Contenders take turns as processes of their own under torchrun, so that each has its own peak; both have ddp_kit's scheduling class, one
thread a rank and torch's fused AdamW, and read the same kind of batches. A round's figure is its median step; a ratio is taken round by
round. Memory is the peak of resident memory above that after the imports, on the rank that has most.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import ddp_kit
from ddp_kit import LossSum, Recipe, process_group
from ddp_kit.compose import compose
from ddp_kit.groups import Group
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.step import train_step

WIDTH, LAYERS, SYMBOLS, LENGTH, BATCH = 512, 6, 256, 64, 8  # 19 million parameters: 300 MB with gradients and AdamW's moments
WARM, STEPS = 3, 20
TIME, MEMORY = 1.03, 1.02  # targets
KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """What the contenders share."""

    global_batch: int = 2 * BATCH
    max_steps: int = WARM + STEPS
    device: Any = "cpu"
    threads: int = 1
    fsdp: Fsdp = field(default_factory=Fsdp)


class Net(nn.Module):
    """Token embedding, torch's own transformer blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tell = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, SYMBOLS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.tell(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(SYMBOLS, (1024, LENGTH + 1), generator=generator))


def batches() -> Iterator[torch.Tensor]:
    tokens = data().tensors[0]
    while True:
        yield from tokens.split(BATCH)


def ours(group: Group, strategy: str) -> Callable[[], None]:
    """ddp_kit's step."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        (tokens,) = batch
        logits = model(tokens[:, :-1])
        return LossSum(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"), tokens[:, 1:].numel())

    chosen: dict[str, Any] = {"strategy": strategy}
    chosen |= {"fsdp": Fsdp(wrap=("TransformerEncoderLayer",))} if strategy == "fsdp" else {}
    chosen |= {"deepspeed": DeepSpeed(stage=2)} if strategy == "deepspeed" else {}
    settings = Settings(**chosen)
    recipe = Recipe(model=Net, loss=loss, optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4), train_data=data)
    made = compose(recipe, settings, group)
    found = made.feed.batches(start=0, end=settings.max_steps)
    group.closing.callback(made.training.control.close)

    def step() -> None:
        train_step(made.training, next(found))

    return step


def by_hand(group: Group, strategy: str) -> Callable[[], None]:
    """The same, as people write it."""
    torch.manual_seed(0)
    net, found = Net(), batches()
    if strategy == "deepspeed":
        return _deepspeed_by_hand(net, found)
    wrapped: nn.Module = net
    if strategy == "fsdp":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    if strategy == "zero1":
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(), optimizer_class=torch.optim.AdamW, parameters_as_bucket_view=True, lr=1e-4, fused=True
        )
    if strategy in ("ddp", "zero1"):
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
        group.closing.callback(lambda: [delattr(wrapped, name) for name in ("reducer", "logger", "process_group")])

    def step() -> None:
        tokens = next(found)
        optimizer.zero_grad()
        loss = cross_entropy(wrapped(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step


def _deepspeed_by_hand(net: nn.Module, found: Iterator[torch.Tensor]) -> Callable[[], None]:
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)

    def step() -> None:
        tokens = next(found)
        engine.backward(cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()))
        engine.step()

    return step


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def one(strategy: str, contender: str) -> None:
    """A rank of one contender: prints its median step and its memory as JSON."""
    with process_group(device="cpu", threads=1) as group:
        base = peak_kib()
        step = (ours if contender == "ddp_kit" else by_hand)(group, strategy)
        times = []
        for _ in range(WARM + STEPS):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        print(json.dumps({"step_s": statistics.median(times[WARM:]), "memory_mib": (peak_kib() - base) / KIB}), flush=True)


def run(strategy: str, contender: str, *, ranks: int) -> dict[str, float]:
    """Returns the slowest rank's step and the largest memory."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone", str(Path(__file__))]
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | ({"DS_ACCELERATOR": "cpu"} if strategy == "deepspeed" else {})
    done = subprocess.run([*launcher, "--one", strategy, contender], env=environ, capture_output=True, text=True)
    found = [json.loads(text) for text in re.findall(r'\{"step_s".*?\}', done.stdout)]  # two ranks may write into one line
    if done.returncode or len(found) != ranks:
        raise SystemExit(f"{strategy} by {contender} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return {name: max(own[name] for own in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero1", "fsdp"], choices=["ddp", "zero1", "fsdp", "deepspeed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "CONTENDER"), help="be a rank of one contender")
    given = parser.parse_args()
    if given.one:
        one(*given.one)
        return
    for strategy in given.strategies:
        rounds: dict[str, list[dict[str, float]]] = {"by hand": [], "ddp_kit": []}
        for number in range(given.rounds):
            for contender in list(rounds) if number % 2 == 0 else list(rounds)[::-1]:
                rounds[contender].append(run(strategy, contender, ranks=given.ranks))
        show(strategy, rounds, ranks=given.ranks)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


def show(strategy: str, rounds: dict[str, list[dict[str, float]]], *, ranks: int) -> None:
    """Prints medians with their spread, and the two ratios."""
    for contender, own in rounds.items():
        rate = [ranks * BATCH / found["step_s"] for found in own]
        memory = [found["memory_mib"] for found in own]
        print(
            f"{strategy:10}{contender:9}{statistics.median(rate):8.1f} samples/s ({min(rate):.1f}-{max(rate):.1f})"
            f"{statistics.median(memory):9.1f} MiB ({min(memory):.1f}-{max(memory):.1f})"
        )
    for name, target in (("step_s", TIME), ("memory_mib", MEMORY)):
        ratios = [a[name] / b[name] for a, b in zip(rounds["ddp_kit"], rounds["by hand"], strict=True)]
        said = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        print(f"{strategy:10}ddp_kit / by hand, {name}: {said}  target {target:.2f}", flush=True)


if __name__ == "__main__":
    main()
