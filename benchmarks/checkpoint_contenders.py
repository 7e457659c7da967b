"""The contenders of `checkpoint.py`: each writes the same tensors its own way."""

import mmap
from collections.abc import Callable
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

from ddp_kit import LossSum, build_loader, wrap
from ddp_kit.checkpoint.checkpointer import About, Checkpointer
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.own_loop import restore
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.state_dict import state_of
from ddp_kit.distributed.process_group import Group
from ddp_kit.training.state import Training

WIDTH, LAYERS = 2048, 24
OURS = "ddp_kit"
MEMCPY = "memcpy of a rank's share"
DCP = "DCP save"
PROCESS = "DCP async_save, process"
READ = "read of all, unverified"
THREAD = "DCP async_save, thread"
TORCH = "torch.save on rank 0"
ACCELERATE = "Accelerate save_state"


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

    feed = build_loader(
        TensorDataset(torch.randn(8, WIDTH)), group=group, global_batch=group.world_size
    )
    training = wrap(net, optimizer, loss, group=group, feed=feed)
    for parameter in net.parameters():
        parameter.grad = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        )
    optimizer.step()
    return training


def ours(training: Training, folder: Path) -> Contender:
    ended: list[Any] = []
    checkpoints = Checkpointer(
        training,
        LocalDisk(folder),
        about=About(run_id="benchmark"),
        keep=Keep(),
        on_end=ended.append,
    )
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
    size = state_bytes(training) // training.group.world_size
    memory = mmap.mmap(-1, 2 * size)
    memory.madvise(mmap.MADV_HUGEPAGE)
    source, target = torch.frombuffer(memory, dtype=torch.uint8).zero_().split(size)

    def begin(_: Path) -> Callable[[], bool]:
        target.copy_(source)
        return lambda: True

    return Contender(begin)


def read(training: Training) -> Contender:
    """The yardstick of loading: every rank reads all bytes into memory that it has, and looks at
    none of them.
    """
    own, ranks = training.group.rank, range(training.group.world_size)
    memory = torch.zeros(state_bytes(training) // len(ranks), dtype=torch.uint8)

    def begin(folder: Path) -> Callable[[], bool]:
        memory.numpy().tofile(folder / f"{own}.bin")
        together()
        return lambda: True

    def load(folder: Path) -> None:
        for rank in ranks:
            with (folder / f"{rank}.bin").open("rb", buffering=0) as file:
                file.readinto(memory.numpy())

    return Contender(begin, load)


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

    return Contender(
        begin, lambda folder: dcp.load(state_of(training).tensors, checkpoint_id=folder)
    )


def dcp_async(training: Training, kind: AsyncCheckpointerType) -> Contender:
    is_process = kind is AsyncCheckpointerType.PROCESS
    stager = DefaultStager(
        StagingOptions(False, is_process, False, False)
    )  # kept, so that its buffers are
    group = (
        None if is_process else dist.new_group(backend="gloo")
    )  # in the group that trains its thread's collectives hang (seen)

    def begin(folder: Path) -> Callable[[], bool]:
        tensors = state_of(training).tensors
        future = dcp.async_save(
            tensors,
            checkpoint_id=folder,
            async_checkpointer_type=kind,
            async_stager=stager,
            process_group=group,
        )

        def is_done() -> bool:
            return bool(future.done() and [future.result()])  # raises what went wrong

        return is_done

    return Contender(begin, close=stager.close)


def together() -> None:
    """Waits for all ranks."""
    dist.all_reduce(torch.zeros(1))


def state_bytes(training: Training) -> int:
    return sum(tensor.nbytes for tensor in state_of(training).tensors.values())


def make(name: str, training: Training, place: Path) -> Contender:
    """Returns a contender; it holds its buffers from now on. Every rank calls it."""
    makers: dict[str, Callable[[], Contender]] = {
        OURS: lambda: ours(training, place / OURS),
        MEMCPY: lambda: memcpy(training),
        READ: lambda: read(training),
        DCP: lambda: dcp_save(training),
        PROCESS: lambda: dcp_async(training, AsyncCheckpointerType.PROCESS),
        THREAD: lambda: dcp_async(training, AsyncCheckpointerType.THREAD),
        TORCH: lambda: torch_save(training),
        ACCELERATE: lambda: accelerate(training),
    }
    return makers[name]()
