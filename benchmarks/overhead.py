"""What the loop costs: ddp_kit's `fit` with its defaults, a hand-written DDP loop, and
Accelerate's, taking turns in one run.

    python benchmarks/overhead.py                                # one process
    torchrun --nproc_per_node=2 benchmarks/overhead.py           # two ranks
    torchrun --nproc_per_node=2 benchmarks/overhead.py --what state

MLP 784-128-64-10, 64 samples a rank, SGD with momentum, one thread a rank. All log the loss over
all ranks every 10 steps; ddp_kit also writes its records, shows progress and exchanges its control
packet. A figure is the median over rounds of a round's mean step; a ratio is taken round by round
to the first row of its table.

`--what state` measures what it costs that models change in their forward pass: a step of two
micro-batches a rank (train_step alone), of the same MLP with one buffer or attribute more, and the
comparison of all ranks' weights at a save or evaluation.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from ddp_kit import LossSum, build_loader, process_group, train_step, wrap
from ddp_kit.data.own_loader import batches_of
from ddp_kit.distributed.process_group import Group
from ddp_kit.model_state.untouched import untouched
from ddp_kit.settings import EarlyStop
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import StopFlag
from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.console import Console
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.training.agreement import Sentinel, require_agreement
from ddp_kit.training.loop import Cadence, fit
from ddp_kit.training.reporter import Reporter

BATCH, LOG_EVERY = 64, 10
TARGETS = {  # (base, contender): ratio
    ("bare loop", "ddp_kit, its own loader"): 1.00,
    ("bare loop", "ddp_kit, the same DataLoader"): 1.02,
    ("bare loop", "ddp_kit, its own loader, single samples"): 1.20,
    ("bare DDP, default class", "ddp_kit, its defaults (SCHED_BATCH)"): 0.50,
    ("bare DDP, SCHED_BATCH", "ddp_kit, its defaults (SCHED_BATCH)"): 1.03,
    ("ddp_kit, --check-every 0 (SCHED_BATCH)", "ddp_kit, its defaults (SCHED_BATCH)"): 1.01,
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def data(samples: int = 60_000) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 784, generator=generator),
        torch.randint(10, (samples,), generator=generator),
    )


class Singles(Dataset[tuple[Tensor, Tensor]]):
    """Answers one sample at a time, as most people's data sets do; ddp_kit gathers those of a
    TensorDataset at once.
    """

    def __init__(self, whole: TensorDataset):
        self.inputs, self.labels = whole.tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]


def endless(group: Group, dataset: Dataset[Any]) -> Iterator[list[torch.Tensor]]:
    """The loader of a hand-written script."""
    sampler = DistributedSampler(dataset, num_replicas=group.world_size, rank=group.rank)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler, drop_last=True)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def logged(loss: torch.Tensor, group: Group) -> None:
    mean = loss.detach().clone()
    if group.pg is not None:
        dist.all_reduce(mean, group=group.pg)
    print(f"loss {mean.item() / group.world_size:.4f}", file=io.StringIO())


def bare(group: Group, dataset: Dataset[Any]) -> Callable[[int], None]:
    """A loop as people write it."""
    net = model()
    wrapped = DistributedDataParallel(net) if group.world_size > 1 else net
    if group.world_size > 1:
        group.closing.callback(
            lambda: [delattr(wrapped, name) for name in ("reducer", "logger", "process_group")]
        )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batches = endless(group, dataset)

    def run(steps: int) -> None:
        for step in range(1, steps + 1):
            inputs, labels = next(batches)
            optimizer.zero_grad()
            loss = cross_entropy(wrapped(inputs), labels)
            loss.backward()
            optimizer.step()
            if step % LOG_EVERY == 0:
                logged(loss, group)

    return run


def accelerated(group: Group, dataset: Dataset[Any]) -> Callable[[int], None]:
    """Accelerate's loop, as its documentation writes it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    if group.world_size > 1:
        group.closing.callback(
            lambda: [delattr(net, name) for name in ("reducer", "logger", "process_group")]
        )

    def endless_loader() -> Iterator[list[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless_loader()

    def run(steps: int) -> None:
        for step in range(1, steps + 1):
            inputs, labels = next(batches)
            optimizer.zero_grad()
            loss = cross_entropy(net(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            if step % LOG_EVERY == 0:
                logged(accelerator.reduce(loss.detach(), "mean"), Alone)

    return run


class Alone:
    """Accelerate has summed already."""

    pg = None
    world_size = 1


def summed(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> LossSum:
    inputs, labels = batch
    return LossSum(cross_entropy(net(inputs), labels, reduction="sum"), len(labels))


def ours(
    group: Group, dataset: Dataset[Any], *, loader: bool, folder: Path, check_every: int = 500
) -> Callable[[int], None]:
    """ddp_kit's `fit` with its defaults; with `loader`, fed by the hand-written script's
    DataLoader.
    """
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    feed = build_loader(dataset, group=group, global_batch=BATCH * group.world_size)
    training = wrap(net, optimizer, summed, group=group, feed=feed)
    training.check_every = check_every
    console = Console(stream=io.StringIO())
    lines = JsonlTracker()
    reporter = Reporter(
        [lines, console] if group.rank == 0 else [],
        log_every=LOG_EVERY,
        progress=[console.progress],
        on_burst=[lines.flush],
    )
    folder.mkdir(parents=True, exist_ok=True)
    reporter.start(RunInfo(run_dir=folder, name="overhead"), step=0)
    cadence = Cadence(end=10**9, steps_per_epoch=0)
    batches = feed.batches(start=0, end=10**9)
    if loader:
        batches = batches_of(endless(group, dataset), group=group, size=BATCH)

    def run(steps: int) -> None:
        taken = (next(batches) for _ in range(steps))
        fit(
            training,
            taken,
            cadence=cadence,
            report=reporter,
            evaluate=lambda epoch: {},
            early_stopping=EarlyStopping(EarlyStop()),
            stop=StopFlag(),
        )
        training.control_packet.close()

    return run


def set_class(name: str) -> None:
    """Puts every thread of this process into a scheduling class."""
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setscheduler(int(thread.name), getattr(os, name), os.sched_param(0))


@dataclass
class Contender:
    name: str
    run: Callable[[int], None]
    scheduling: str  # of its process


def contenders(group: Group, folder: Path) -> list[Contender]:
    dataset = data()
    loop = bare(group, dataset)
    own = ours(group, dataset, loader=False, folder=folder / "own")
    fed = ours(group, dataset, loader=True, folder=folder / "fed")
    unchecked = ours(group, dataset, loader=False, folder=folder / "unchecked", check_every=0)
    singles = ours(group, Singles(dataset), loader=False, folder=folder / "singles")
    if group.world_size == 1:
        return [
            Contender("bare loop", loop, "SCHED_OTHER"),
            Contender("ddp_kit, its own loader", own, "SCHED_OTHER"),
            Contender("ddp_kit, the same DataLoader", fed, "SCHED_OTHER"),
            Contender("ddp_kit, its own loader, single samples", singles, "SCHED_OTHER"),
            Contender("Accelerate", accelerated(group, dataset), "SCHED_OTHER"),
        ]
    return [
        Contender("bare DDP, default class", loop, "SCHED_OTHER"),
        Contender("ddp_kit, its defaults (SCHED_BATCH)", own, "SCHED_BATCH"),
        Contender("ddp_kit, --check-every 0 (SCHED_BATCH)", unchecked, "SCHED_BATCH"),
        Contender("Accelerate, default class", accelerated(group, dataset), "SCHED_OTHER"),
        Contender("bare DDP, SCHED_BATCH", loop, "SCHED_BATCH"),
        Contender("ddp_kit, the same DataLoader, SCHED_BATCH", fed, "SCHED_BATCH"),
        Contender("ddp_kit, default class", own, "SCHED_OTHER"),
        Contender("ddp_kit, its own loader, single samples, SCHED_BATCH", singles, "SCHED_BATCH"),
    ]


class WithState(nn.Module):
    """The MLP, with something that a forward pass finds or changes."""

    def __init__(self, what: str):
        super().__init__()
        self.net = model()
        self.what = what
        self.calls = 0
        if what:
            self.register_buffer("state", torch.zeros(784))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.what == "buffer":
            self.state = self.state + 1
        if self.what == "attribute":
            self.calls += 1
        return self.net(inputs)


STATES = {
    "nothing but weights": ("", {}),
    "a buffer that never changes": ("still", {}),
    "a buffer that changes (first)": ("buffer", {}),
    "a buffer that changes (mean)": ("buffer", {"state": "mean"}),
    "a buffer that changes (own)": ("buffer", {"state": "own"}),
    "an attribute that changes": ("attribute", {}),
}


def state_contenders(group: Group) -> list[Contender]:
    found = []
    for name, (what, words) in STATES.items():
        net = WithState(what)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        feed = build_loader(
            data(), group=group, global_batch=2 * BATCH * group.world_size, micro_batch=BATCH
        )
        training = wrap(net, optimizer, summed, group=group, feed=feed, buffers=words)
        batches = feed.batches(start=0, end=10**9)

        def run(steps: int, training: Any = training, batches: Any = batches) -> None:
            for _ in range(steps):
                train_step(training, next(batches))

        found.append(Contender(name, run, "SCHED_BATCH"))
    return found


def show_agreement(group: Group) -> None:
    """Prints what agreeing and the census cost: one comparison of the ranks' weights, with the look
    for late changes, at each save and evaluation; one snapshot of the model, compared and put back,
    around each of the three passes before the first step; of the sentinel, which sends a digest
    beside training, the share of training at one in 500 steps.
    """
    if group.rank == 0:
        print("agreement and census, medians of 20; a step is train_step alone")
        print(
            f"{'weights':>9} {'step':>9} {'agree':>9} {'1 % from':>10} {'census':>9} {'start':>9} "
            f"{'sentinel':>8}"
        )
    for width in (128, 1024, 3072):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(784, width), nn.Linear(width, width), nn.Linear(width, 10))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        feed = build_loader(data(600), group=group, global_batch=BATCH * group.world_size)
        training = wrap(net, optimizer, summed, group=group, feed=feed)
        batches = feed.batches(start=0, end=10**9)
        sentinel = Sentinel(training, every=1)
        steps = []
        compared = []
        beside = []
        for _ in range(22):
            begin = time.perf_counter()
            train_step(training, next(batches))
            middle = time.perf_counter()
            require_agreement(training)
            end = time.perf_counter()
            steps.append(middle - begin)
            compared.append(end - middle)
            # Sends a digest, as --check-every does, and takes the answer.
            sentinel.look(is_compared=False)
            training.control_packet.exchange()
            beside.append(time.perf_counter() - end)
            sentinel.look(is_compared=True)
        census = []
        for _ in range(22):
            begin = time.perf_counter()
            with untouched(net) as before:
                before.changes()
            census.append(time.perf_counter() - begin)
        if group.rank == 0:
            size = sum(parameter.numel() for parameter in net.parameters())
            step = statistics.median(steps[2:])
            once = statistics.median(compared[2:])
            seen = statistics.median(census[2:])
            sent = statistics.median(beside[2:])
            print(
                f"{size / 1e6:7.1f} M {step * 1e3:6.2f} ms {once * 1e3:6.2f} ms "
                f"{100 * once / step:4.0f} steps {seen * 1e3:6.2f} ms {3 * seen / step:3.1f} steps "
                f"{sent / step / 5:6.3f} %"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--what", choices=["loop", "state"], default="loop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with (
        process_group(device="cpu", threads=1, tuning=False) as group,
        tempfile.TemporaryDirectory() as folder,
    ):
        if options.what == "state":
            show_agreement(group)
            taking_turns = state_contenders(group)
        else:
            taking_turns = contenders(group, Path(folder))
        times: dict[str, list[float]] = {contender.name: [] for contender in taking_turns}
        for round_ in range(options.rounds + 1):
            for contender in taking_turns:
                set_class(contender.scheduling)
                contender.run(20)
                begin = time.perf_counter()
                contender.run(options.steps)
                if round_:  # the first round warms up
                    times[contender.name].append(
                        (time.perf_counter() - begin) / options.steps * 1e6
                    )
        if group.rank == 0:
            show(times, group.world_size, options)


def show(times: dict[str, list[float]], world_size: int, options: argparse.Namespace) -> None:
    print(
        f"{world_size} ranks, torch {torch.__version__}, "
        f"{options.rounds} rounds of {options.steps} steps, load {os.getloadavg()[0]:.1f}"
    )
    bases = ["bare DDP, default class", "bare DDP, SCHED_BATCH"]
    bases.append("ddp_kit, --check-every 0 (SCHED_BATCH)")
    if options.what == "state":
        bases = list(STATES)[:1]
    elif world_size == 1:
        bases = ["bare loop"]
    for base in bases:
        print(
            f"{'contender':52} {'us/step median (min-max)':28} ratio to {base!r}: median (min-max)"
        )
        for name, own in times.items():
            ratios = [a / b for a, b in zip(own, times[base], strict=True)]
            spread = f"{statistics.median(own):.0f} ({min(own):.0f}-{max(own):.0f})"
            target = f"  target {TARGETS[base, name]:.2f}" if (base, name) in TARGETS else ""
            print(
                f"{name:52} {spread:28} "
                f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f}){target}"
            )


if __name__ == "__main__":
    main()
