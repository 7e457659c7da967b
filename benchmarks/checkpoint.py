"""What a checkpoint costs: ddp_kit's, torch.save, torch.distributed.checkpoint (DCP) and
Accelerate, taking turns in one run.

    torchrun --nproc_per_node=2 benchmarks/checkpoint.py        # 1, 2 or 4 ranks

100 million fp32 parameters and AdamW's moments on every rank, 1.2 GB, as plain DDP has them. All
contenders write the same tensors.

block      the time that the call takes, with nothing beside
durable    the time until all of it is on disk, with nothing beside; torch.save and Accelerate do
           not fsync
slowdown   what a save costs training as a whole: the call, and how much longer the steps take until
           it is done; a step is a few matrix products on all cores and an all-reduce
load       the second one in a row, so warm; only ddp_kit verifies (CRC-32 of all bytes). The plain
           read shows what is left to win

A figure is that of the slowest rank, the median over rounds; a ratio is taken round by round. Wants
12 GB of memory at 2 ranks and 24 at 4.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_contenders import (
    ACCELERATE,
    DCP,
    MEMCPY,
    OURS,
    PROCESS,
    READ,
    THREAD,
    TORCH,
    Contender,
    make,
    state_bytes,
    together,
    trained,
)

from ddp_kit import process_group
from ddp_kit.distributed.process_group import Group
from ddp_kit.training.state import Training

TARGETS = [
    ("block", MEMCPY, 1.2),
    ("block", PROCESS, 0.6),
    ("slowdown", PROCESS, 0.25),
    ("durable", DCP, 0.8),
    ("load", DCP, 0.2),
]
BATCHES = [
    [MEMCPY, READ, DCP, PROCESS],
    [THREAD, TORCH, ACCELERATE],
]  # beside ddp_kit: not all buffers fit into memory at once


class Table:
    """Seconds by kind and contender, round by round, the same on all ranks; and the bytes that each
    wrote.
    """

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, list[float]]] = {
            kind: defaultdict(list) for kind in ("block", "durable", "slowdown", "load")
        }
        self.sizes: dict[str, int] = {}

    def add(self, name: str, **seconds: float) -> None:
        for kind, value in seconds.items():
            self.figures[kind][name].append(value)
        if dist.get_rank() == 0:
            print(
                name,
                *(f"{kind} {value:.3f}" for kind, value in seconds.items()),
                file=sys.stderr,
                flush=True,
            )

    def show(self) -> None:
        print(
            f"{'seconds, median (min-max)':26}"
            + "".join(f"{kind:>21}" for kind in self.figures)
            + f"{'written, MB':>13}"
        )
        for name, size in self.sizes.items():
            cells = [own[name] for own in self.figures.values()]
            texts = [
                f"{statistics.median(cell):.3f} ({min(cell):.2f}-{max(cell):.2f})" if cell else ""
                for cell in cells
            ]
            print(f"{name:26}" + "".join(f"{text:>21}" for text in texts) + f"{size / 1e6:13.0f}")
        for kind, other, target in TARGETS:
            with suppress(statistics.StatisticsError):
                ratios = [
                    a / b
                    for a, b in zip(
                        self.figures[kind][OURS], self.figures[kind][other], strict=False
                    )
                ]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                print(f"{kind:10} of ddp_kit / {other:26} {spread:20} target <= {target}")
        print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


class Step:
    """What trains beside: a few milliseconds on all cores, and an all-reduce, as which the ranks
    also agree whether a save is done.
    """

    def __init__(self) -> None:
        self._factors, self._sums = torch.randn(2, 512, 512), torch.zeros(1 << 18)

    def __call__(self, *, is_done: bool) -> bool:
        for _ in range(4):
            torch.mm(*self._factors)
        self._sums[0] = float(is_done)
        dist.all_reduce(self._sums)
        return bool(self._sums[0] == dist.get_world_size())


def saved(contender: Contender, folder: Path) -> tuple[float, float]:
    """Returns the seconds that the call took, and those until the save was durable."""
    together()
    begin = time.perf_counter()
    is_done = contender.begin(folder)
    block = time.perf_counter() - begin
    while not is_done():
        time.sleep(0.001)
    return slowest(block), slowest(time.perf_counter() - begin)


def slowdown(contender: Contender, folder: Path, *, step: Step, steps: int = 30) -> float:
    """Returns the seconds that a save costs training."""

    def alone() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            step(is_done=True)
        return (time.perf_counter() - begin) / steps

    before = alone()
    begin, count = time.perf_counter(), 1
    is_done = contender.begin(folder)
    while not step(is_done=is_done()):
        count += 1
    whole = time.perf_counter() - begin
    return slowest(whole - count * (before + alone()) / 2)


@contextmanager
def scratch(folder: Path, group: Group) -> Iterator[Path]:
    """Yields an empty folder; no writing is left that would disturb the next contender."""
    folder.mkdir(exist_ok=True)
    together()
    yield folder
    together()
    if group.rank == 0:
        shutil.rmtree(folder)
        os.sync()
    together()


def peak(call: Callable[[], Any]) -> float:
    """Returns by how many MiB this process outgrew its memory during a call."""

    def memory(name: str) -> int:
        return next(
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1024


def first_save(training: Training, place: Path) -> Contender:
    """Makes ddp_kit's contender, and prints what its first save needs."""
    made: list[Contender] = []

    def run() -> None:
        made.append(make(OURS, training, place))
        with scratch(place / OURS, training.group) as folder:
            saved(made[0], folder)

    more, shard = peak(run), state_bytes(training) / training.group.world_size / 2**20
    if training.group.rank == 0:
        print(
            f"memory for ddp_kit's first save: {more:.0f} MiB on rank 0, "
            f"{more / shard:.3f} times its shard of {shard:.0f} MiB",
            flush=True,
        )
    return made[0]


def save_in_turns(
    contenders: dict[str, Contender], group: Group, place: Path, *, rounds: int, table: Table
) -> None:
    step = Step()
    for round_ in range(rounds + 1):  # the first one warms up: buffers, processes, the disk's cache
        for name, contender in contenders.items():
            with scratch(place / name, group) as folder:
                block, durable = saved(contender, folder)
                table.sizes[name] = sum(
                    file.stat().st_size for file in folder.rglob("*") if file.is_file()
                )
            with scratch(place / name, group) as folder:
                whole = slowdown(contender, folder, step=step)
            if round_:
                table.add(name, block=block, durable=durable, slowdown=whole)


def load_in_turns(
    contenders: dict[str, Contender], group: Group, place: Path, *, rounds: int, table: Table
) -> None:
    for _ in range(rounds):
        for name, contender in contenders.items():
            if contender.load is not None:
                with scratch(place / name, group) as folder:
                    saved(contender, folder)
                    contender.load(folder)
                    together()
                    begin = time.perf_counter()
                    contender.load(folder)
                    table.add(name, load=slowest(time.perf_counter() - begin))


def measure(training: Training, place: Path, *, rounds: int, names: Sequence[str]) -> Table:
    table = Table()
    contenders = {OURS: first_save(training, place)}
    for batch in BATCHES:
        contenders |= {name: make(name, training, place) for name in batch if name in names}
        save_in_turns(contenders, training.group, place, rounds=rounds, table=table)
        for name in [name for name, contender in contenders.items() if contender.load is None]:
            contenders.pop(name).close()
    load_in_turns(contenders, training.group, place, rounds=rounds, table=table)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; not in memory")
    parser.add_argument(
        "--only",
        nargs="*",
        default=[name for batch in BATCHES for name in batch],
        help="contenders beside ddp_kit",
    )
    options = parser.parse_args()
    with process_group(device="cpu") as group:
        place = [tempfile.mkdtemp(dir=options.folder) if group.rank == 0 else None]
        dist.broadcast_object_list(place)
        try:
            table = measure(
                trained(group), Path(place[0]), rounds=options.rounds, names=options.only
            )
        finally:
            shutil.rmtree(place[0], ignore_errors=True)
        if group.rank == 0:
            print(
                f"{group.world_size} ranks, torch {torch.__version__}, "
                f"{options.rounds} rounds in {place[0]}"
            )
            table.show()


if __name__ == "__main__":
    main()
