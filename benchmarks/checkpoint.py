"""What a checkpoint costs: ddp_kit's, torch.save, torch.distributed.checkpoint (DCP) and Accelerate, taking turns in one run.

    torchrun --nproc_per_node=2 benchmarks/checkpoint.py        # 1, 2 or 4 ranks

100 million fp32 parameters and AdamW's moments on every rank, 1.2 GB, as plain DDP has them. All contenders write the same tensors.

block      the time that the call takes, with nothing beside
durable    the time until all of it is on disk, with nothing beside; torch.save and Accelerate do not fsync
slowdown   what a save costs training as a whole: the call, and how much longer the steps take until it is done; a step is a few matrix
           products on all cores and an all-reduce
load       the second one in a row, so warm; only ddp_kit verifies (SHA-256 of all bytes), and it alone makes the optimizer's state anew

A figure is that of the slowest rank, the median over rounds; a ratio is taken round by round. Wants 12 GB of memory and of disk.
"""

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.utils.data import TensorDataset

from ddp_kit import LossSum, build_loader, process_group, wrap
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.storage import LocalDisk
from ddp_kit.groups import Group
from ddp_kit.saving import About, Checkpoints, restore
from ddp_kit.state import state_of
from ddp_kit.training import Training

WIDTH, LAYERS = 2048, 24
OURS, DCP, PROCESS, MEMCPY = "ddp_kit", "DCP save", "DCP async_save, process", "memcpy of a rank's share"
TARGETS = [("block", MEMCPY, 1.2), ("block", PROCESS, 0.6), ("slowdown", PROCESS, 0.25), ("durable", DCP, 0.8), ("load", DCP, 0.2)]
THREAD, TORCH, ACCELERATE = "DCP async_save, thread", "torch.save on rank 0", "Accelerate save_state"
BATCHES = [[MEMCPY, DCP, PROCESS], [THREAD, TORCH, ACCELERATE]]  # beside ddp_kit: not all buffers fit into memory at once


@dataclass
class Contender:
    """`begin` starts a save into a folder and returns what tells whether it is done."""

    begin: Callable[[Path], Callable[[], bool]]
    load: Callable[[Path], Any] | None = None
    close: Callable[[], None] = lambda: None


def trained(group: Group) -> Training:
    """Returns 1.2 GB of state, after one step of AdamW."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    optimizer = torch.optim.AdamW(net.parameters())

    def loss(net: nn.Module, batch: tuple[torch.Tensor]) -> LossSum:
        return LossSum(net(batch[0]).square().sum(), len(batch[0]))

    feed = build_loader(TensorDataset(torch.randn(8, WIDTH)), group=group, global_batch=group.world_size)
    training = wrap(net, optimizer, loss, group=group, feed=feed)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    optimizer.step()
    return training


def ours(training: Training, folder: Path) -> Contender:
    ended: list[Any] = []
    checkpoints = Checkpoints(training, LocalDisk(folder), about=About(run_id="benchmark"), keep=Keep(), on_end=ended.append)
    checkpoints.prepare()

    def begin(_: Path) -> Callable[[], bool]:
        ended.clear()
        training.step += 1
        checkpoints.save({})
        return is_done

    def is_done() -> bool:
        checkpoints.report()
        return bool(ended)

    return Contender(begin, lambda folder: restore(training, folder))


def memcpy(training: Training) -> Contender:
    """The yardstick, into memory as good as ours: page-aligned, in huge pages, touched."""
    size = sum(tensor.nbytes for tensor in state_of(training).tensors.values()) // training.group.world_size
    memory = mmap.mmap(-1, 2 * size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    source, target = torch.frombuffer(memory, dtype=torch.uint8).zero_().split(size)

    def begin(_: Path) -> Callable[[], bool]:
        target.copy_(source)
        return lambda: True

    return Contender(begin)


def torch_save(training: Training) -> Contender:
    def begin(folder: Path) -> Callable[[], bool]:
        if training.group.rank == 0:
            torch.save(state_of(training).tensors, folder / "all.pt")
        together()
        return lambda: True

    return Contender(begin, lambda folder: torch.load(folder / "all.pt", weights_only=True))


def accelerate(training: Training) -> Contender:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(training.model, evaluation_mode=True)  # once in DDP is enough
    accelerator.prepare_optimizer(training.objectives[0].optimizer)

    def begin(folder: Path) -> Callable[[], bool]:
        accelerator.save_state(str(folder))
        together()
        return lambda: True

    return Contender(begin, lambda folder: accelerator.load_state(str(folder)))


def dcp_save(training: Training) -> Contender:
    def begin(folder: Path) -> Callable[[], bool]:
        dcp.save(state_of(training).tensors, checkpoint_id=folder)
        return lambda: True

    return Contender(begin, lambda folder: dcp.load(state_of(training).tensors, checkpoint_id=folder))


def dcp_async(training: Training, kind: AsyncCheckpointerType) -> Contender:
    is_process = kind is AsyncCheckpointerType.PROCESS
    stager = DefaultStager(StagingOptions(False, is_process, False, False))  # kept, so that its buffers are
    group = None if is_process else dist.new_group(backend="gloo")  # in the group that trains its thread's collectives hang (seen)

    def begin(folder: Path) -> Callable[[], bool]:
        tensors = state_of(training).tensors
        future = dcp.async_save(tensors, checkpoint_id=folder, async_checkpointer_type=kind, async_stager=stager, process_group=group)

        def is_done() -> bool:
            return bool(future.done() and [future.result()])  # raises what went wrong

        return is_done

    return Contender(begin, close=stager.close)


def together() -> None:
    dist.all_reduce(torch.zeros(1))


def slowest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


class Step:
    """What trains beside: a few milliseconds on all cores, and an all-reduce, as which the ranks also agree whether a save is done."""

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
    """Yields an empty folder, and leaves no writing behind that would disturb the next contender."""
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
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    call()
    return (memory("VmHWM") - before) / 1024


def measure(
    training: Training, place: Path, *, rounds: int, names: Sequence[str]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    group, step = training.group, Step()
    ours_at = place / OURS
    made: dict[str, Callable[[], Contender]] = {
        OURS: lambda: ours(training, ours_at),
        MEMCPY: lambda: memcpy(training),
        DCP: lambda: dcp_save(training),
        PROCESS: lambda: dcp_async(training, AsyncCheckpointerType.PROCESS),
        THREAD: lambda: dcp_async(training, AsyncCheckpointerType.THREAD),
        TORCH: lambda: torch_save(training),
        ACCELERATE: lambda: accelerate(training),
    }
    figures: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in ("block", "durable", "slowdown", "load")}
    sizes: dict[str, int] = {}
    contenders: dict[str, Contender] = {}

    def first() -> None:
        contenders[OURS] = made[OURS]()
        with scratch(ours_at, group) as folder:
            saved(contenders[OURS], folder)

    more, shard = peak(first), sum(tensor.nbytes for tensor in state_of(training).tensors.values()) / group.world_size / 2**20
    if group.rank == 0:
        print(f"host memory for the first save of ddp_kit: {more:.0f} MiB on rank 0, {more / shard:.3f} times its shard of {shard:.0f} MiB")
    for batch in BATCHES:
        contenders |= {name: made[name]() for name in batch if name in names}
        for round_ in range(rounds + 1):  # the first one warms up: buffers, processes, the disk's cache
            for name, contender in contenders.items():
                with scratch(place / name, group) as folder:
                    block, durable = saved(contender, folder)
                    sizes[name] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                with scratch(place / name, group) as folder:
                    whole = slowdown(contender, folder, step=step)
                if round_:
                    for kind, value in (("block", block), ("durable", durable), ("slowdown", whole)):
                        figures[kind][name].append(value)
        for name in batch:
            if name in contenders and contenders[name].load is None:
                contenders.pop(name).close()
    for _ in range(rounds):
        for name, contender in contenders.items():
            if contender.load is not None:
                with scratch(place / name, group) as folder:
                    saved(contender, folder)
                    contender.load(folder)
                    together()
                    begin = time.perf_counter()
                    contender.load(folder)
                    figures["load"][name].append(slowest(time.perf_counter() - begin))
    return figures, sizes


def show(figures: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> None:
    print(f"{'seconds, median (min-max)':26}" + "".join(f"{kind:>21}" for kind in figures) + f"{'written, MB':>13}")
    for name, size in sizes.items():
        cells = [own[name] for own in figures.values()]
        texts = [f"{statistics.median(cell):.3f} ({min(cell):.2f}-{max(cell):.2f})" if cell else "" for cell in cells]
        print(f"{name:26}" + "".join(f"{text:>21}" for text in texts) + f"{size / 1e6:13.0f}")
    for kind, other, target in TARGETS:
        with suppress(statistics.StatisticsError):
            ratios = [a / b for a, b in zip(figures[kind][OURS], figures[kind][other], strict=False)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"{kind:10} of ddp_kit / {other:26} {spread:20} target <= {target}")
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; not in memory")
    parser.add_argument("--only", nargs="*", default=[name for batch in BATCHES for name in batch], help="contenders beside ddp_kit")
    options = parser.parse_args()
    with process_group(device="cpu") as group:
        place = [tempfile.mkdtemp(dir=options.folder) if group.rank == 0 else None]
        dist.broadcast_object_list(place)
        try:
            figures, sizes = measure(trained(group), Path(place[0]), rounds=options.rounds, names=options.only)
        finally:
            shutil.rmtree(place[0], ignore_errors=True)
        if group.rank == 0:
            print(f"{group.world_size} ranks, torch {torch.__version__}, {options.rounds} rounds in {place[0]}")
            show(figures, sizes)


if __name__ == "__main__":
    main()
