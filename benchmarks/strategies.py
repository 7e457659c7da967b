"""Each strategy beside the same thing written by hand in bare torch (or DeepSpeed): time of a step
and peak memory of a rank.

    python benchmarks/strategies.py    # ddp, zero1, fsdp; DeepSpeed's stages 1 to 3 where it is
                                       # installed

The two contenders of a strategy have ranks of their own, which take turns step by step. Both have
ddp_kit's scheduling class and allocator settings, one thread a rank and torch's fused AdamW, and
read the same kind of batches. A ratio is taken round by round.

Memory is taken in other starts, with an allocator that gives back at once what is freed: else the
peak is what fragments of the heap add up to, up to twice what is in use, and another figure each
time. It is the peak of resident memory above that after the imports, on the rank that has most.
"""

import argparse
import ctypes
import os
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from turns import serve, show, start, take_turns

import ddp_kit
from ddp_kit import LossSum, Recipe, process_group
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.process_tuning import M_MMAP_THRESHOLD
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.setup.build import build
from ddp_kit.training.step import train_step

# 19 million parameters: 300 MB with gradients and AdamW's moments.
WIDTH = 512
LAYERS = 6
SYMBOLS = 256
LENGTH = 64
BATCH = 8
STAGES = ["deepspeed-1", "deepspeed-2", "deepspeed-3"]
STEPS_TO_PEAK = 6  # after which none adds any
CONTENDERS = ["by hand", "ddp_kit"]
TIME, MEMORY = 1.03, 1.02  # targets


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """What the contenders share."""

    global_batch: int = 2 * BATCH
    max_steps: int = 10**9
    device: Any = "cpu"
    threads: int = 1


class Net(nn.Module):
    """Token embedding, torch's own transformer blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tell = nn.Embedding(SYMBOLS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
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
        return LossSum(
            cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"),
            tokens[:, 1:].numel(),
        )

    chosen: dict[str, Any] = {"strategy": strategy}
    chosen |= {"fsdp": Fsdp(wrap=("TransformerEncoderLayer",))} if strategy == "fsdp" else {}
    if strategy in STAGES:
        chosen = {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=int(strategy[-1]))}
    settings = Settings(**chosen)
    recipe = Recipe(
        model=Net,
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
        train_data=data,
    )
    made = build(recipe, settings, group)
    found = made.feed.batches(start=0, end=10**9)
    group.closing.callback(made.training.control_packet.close)

    def step() -> None:
        train_step(made.training, next(found))

    return step


def by_hand(group: Group, strategy: str) -> Callable[[], None]:
    """The same, as people write it."""
    torch.manual_seed(0)
    net, found = Net(), batches()
    if strategy in STAGES:
        return _deepspeed_by_hand(net, found, stage=int(strategy[-1]))
    wrapped: nn.Module = net
    if strategy == "fsdp":
        for block in net.blocks:
            fully_shard(block)
        fully_shard(net)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    if strategy == "zero1":
        optimizer = ZeroRedundancyOptimizer(
            net.parameters(),
            optimizer_class=torch.optim.AdamW,
            parameters_as_bucket_view=True,
            lr=1e-4,
            fused=True,
        )
    if strategy in ("ddp", "zero1"):
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=True)
        group.closing.callback(
            lambda: [delattr(wrapped, name) for name in ("reducer", "logger", "process_group")]
        )

    def step() -> None:
        tokens = next(found)
        optimizer.zero_grad()
        loss = cross_entropy(wrapped(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()

    return step


def _deepspeed_by_hand(
    net: nn.Module, found: Iterator[torch.Tensor], *, stage: int
) -> Callable[[], None]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=optimizer, config=config, dist_init_required=False
    )

    def step() -> None:
        tokens = next(found)
        engine.backward(
            cross_entropy(engine(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        )
        engine.step()

    return step


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(strategy: str, contender: str, *, takes_memory: bool) -> None:
    """A rank of one contender: takes its turns, then says how far its memory went."""
    if strategy in STAGES:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401  # its memory is not the step's
    if takes_memory:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    with process_group(device="cpu", threads=1, tuning=not takes_memory) as group:
        base = peak_mib()
        step = (ours if contender == "ddp_kit" else by_hand)(group, strategy)

        def run(steps: int) -> None:
            for _ in range(steps):
                step()

        serve(run)
        print(f"memory {peak_mib() - base}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    known = ["ddp", "zero1", "fsdp", *STAGES]
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=known if find_spec("deepspeed") else known[:3],
        choices=known,
    )
    parser.add_argument(
        "--starts", type=int, default=4, help="times that a strategy's ranks are started anew"
    )
    parser.add_argument("--rounds", type=int, default=20, help="rounds of each start")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps in a turn")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", help="with --contender: be a rank of one")
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--takes-memory", action="store_true")
    given = parser.parse_args()
    if given.contender:
        one(given.strategy, given.contender, takes_memory=given.takes_memory)
        return
    print(
        f"{given.ranks} ranks, {BATCH} samples a rank, torch {torch.__version__}; "
        f"{given.starts} starts, ",
        end="",
    )
    print(f"{given.rounds} rounds each of {given.steps} steps a turn", flush=True)
    for strategy in given.strategies:
        print(f"\n{strategy}")
        times = times_of(strategy, given)
        rates = [
            f"{name} {given.ranks * BATCH * 1e3 / statistics.median(own):.1f}"
            for name, own in times.items()
        ]
        print(f"samples/s: {', '.join(rates)}")
        show(times, targets={"ddp_kit": TIME}, digits=3)
        show(peaks_of(strategy, given), unit="peak MiB", targets={"ddp_kit": MEMORY}, digits=3)


def times_of(strategy: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Returns milliseconds per step, round by round."""
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(given.starts):
        names = CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]
        contenders = start(
            names, script=__file__, world_size=given.ranks, arguments=["--strategy", strategy]
        )
        for name, own in take_turns(contenders, rounds=given.rounds, steps=given.steps).items():
            times[name] += own
        for contender in contenders:
            contender.close()
    return times


def peaks_of(strategy: str, given: argparse.Namespace) -> dict[str, list[float]]:
    """Returns MiB of the rank that has most."""
    peaks: dict[str, list[float]] = {}
    arguments = ["--strategy", strategy, "--takes-memory"]
    for contender in start(
        CONTENDERS, script=__file__, world_size=given.ranks, arguments=arguments
    ):
        contender.run(STEPS_TO_PEAK)
        peaks[contender.name] = [
            max(float(said.split("memory ")[1].split()[0]) for said in contender.close())
        ]
    return peaks


if __name__ == "__main__":
    main()
