"""`--exact`: one run, whatever the number of ranks, bit for bit."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, plain, recipe, vectors, weighted
from gans import gan
from launching import train
from lives import Life, lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset, TensorDataset

from ddp_kit import Data, LossSum, Recipe, schedules
from ddp_kit.config.validation import check
from ddp_kit.data.batch_plan import fitting_world_sizes
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tree_sum import fold
from ddp_kit.errors import ConfigError
from ddp_kit.lifecycle.session import session
from ddp_kit.setup.build import build
from ddp_kit.strategies.precision import deterministic
from ddp_kit.testing import run_ranks

LEAVES = [
    1e8,
    1.0,
    -1e8,
    1.0,
]  # in fp32, on any machine, their sum is 1 one after the other, and 0 in pairs: 1e8 + 1 is 1e8
SLOW = [pytest.mark.slow, pytest.mark.steady]


def exact(**fields: Any) -> Settings:
    """Returns settings of 8 micro-batches whose every step is recorded."""
    given = {
        "global_batch": 32,
        "micro_batch": 4,
        "max_steps": 6,
        "precision": "fp32",
        "exact": True,
        "log_every": 1,
        "eval_every": 2,
    }
    return Settings(**(given | fields))


# The tree


@pytest.mark.parametrize("leaves", [*range(1, 25), 48, 96])
def test_folding_the_parts_of_any_number_of_ranks_gives_the_bits_of_one(leaves: int) -> None:
    values = (
        torch.randn(leaves, 1000, generator=torch.Generator().manual_seed(leaves))
        * 10 ** torch.linspace(-3, 3, leaves)[:, None]
    )
    whole = fold(list(values.clone()))
    assert torch.allclose(whole.double(), values.double().sum(0), rtol=1e-3, atol=1e-2)
    for ranks in fitting_world_sizes(leaves):
        nodes = [fold(list(part)) for part in values.clone().chunk(ranks)]
        assert torch.equal(fold(nodes), whole), ranks


def test_the_tree_is_another_order_than_one_after_the_other() -> None:
    values = torch.tensor(LEAVES)
    one_by_one = torch.zeros(())
    for value in values:
        one_by_one += value
    assert one_by_one == 1
    assert fold(list(values)) == 0


# Whole runs


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def jittered(batch: Any, draws: Any) -> Any:
    return batch[0] + torch.from_numpy(draws.normal(3, 8, 8)).to(batch[0].dtype), batch[1]


def conv() -> nn.Module:
    """BatchNorm, dropout, and more than DDP's first bucket of 1 MiB."""
    head = [
        nn.Flatten(),
        nn.Linear(8 * 36, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(1024, 512),
        nn.Linear(512, 10),
    ]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)


def loss(model: nn.Module, batch: Any) -> LossSum:
    logits = model(batch[0])
    right = (logits.argmax(1) == batch[1]).sum()
    return LossSum(
        cross_entropy(logits, batch[1], reduction="sum"),
        len(batch[1]),
        metrics={"accuracy": (right, len(batch[1]))},
    )


def with_everything(settings: Settings) -> Recipe:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if settings.momentum:
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=settings.momentum)
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    return recipe(
        settings,
        model=conv,
        loss=loss,
        optimizer=optimizer,
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(images(64), augment=jittered),
        eval_data=lambda: images(42),
    )


def bits(life: Life) -> dict[str, Any]:
    """Returns all that must be equal, with the numbers of records as metrics.jsonl has them."""
    apart = ("samples_per_s", "data_wait", "peak_memory_mib")
    records = [
        json.dumps({name: value for name, value in record.items() if name not in apart})
        for record in life.records
    ]
    tensors = {**life.state, **{f"file of {name}": tensor for name, tensor in life.files.items()}}
    return {f"record {i}": record for i, record in enumerate(records)} | {
        name: tensor.numpy().tobytes() for name, tensor in tensors.items()
    }


def differing(
    make: Callable[[Settings], Recipe], settings: Settings, *, world_sizes: tuple[int, ...]
) -> list[str]:
    """Returns the names of what is not the same bits at all world sizes."""
    found = [bits(lives(make, settings, world_size=ranks)[0]) for ranks in world_sizes]
    assert "record 5" in found[0]
    names: list[str] = []
    for a, b in pairwise(found):
        names += [name for name in a if a[name] != b[name]]
    return names


@pytest.mark.parametrize("momentum", [0.0, pytest.param(0.9, marks=SLOW)])
def test_weights_statistics_and_losses_are_the_same_bits_at_1_2_and_4_ranks(
    momentum: float,
) -> None:
    """With convolutions, BatchNorm, dropout, augmentation, several buckets, a schedule, an average, and clipping at half the usual norm."""
    settings = exact(momentum=momentum, grad_clip=1.9, ema=0.5)
    assert not differing(with_everything, settings, world_sizes=(1, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"compile": True},
        {"activation_checkpointing": "Linear"},
        {"precision": "bf16"},
        {"num_workers": 2},
    ],
)
def test_it_holds_at_8_ranks_and_with_other_settings(fields: dict[str, Any]) -> None:
    assert not differing(with_everything, exact(**fields), world_sizes=(1, 4, 2, 8))


def slope(settings: Settings) -> Recipe:
    """One weight, which is 0; the micro-batches' gradients are the leaves, in their order."""

    def flat() -> nn.Module:
        line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(line.weight)
        return line

    return recipe(
        settings,
        model=flat,
        loss=lambda model, batch: LossSum(model(batch[0]).sum(), len(batch[0])),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0),
        train_data=lambda: Data(
            TensorDataset(torch.tensor(LEAVES)[:, None]),
            order=lambda seed, epoch, size: range(size),
        ),
        eval_data=None,
    )


@pytest.mark.parametrize(("is_exact", "weights"), [(True, [0.0, 0.0, 0.0]), (False, [-0.25, 0.0])])
def test_exact_sums_in_pairs_at_any_number_of_ranks_and_plain_sums_do_not(
    is_exact: bool, weights: list[float]
) -> None:
    """Where the order of a sum decides, so that the tests here would see another one."""
    settings = exact(
        exact=is_exact, threads=1, global_batch=4, micro_batch=1, max_steps=1, eval_every=0
    )
    found = [
        lives(slope, settings, world_size=ranks)[0].state["weight"].item()
        for ranks in (1, 2, 4)[: len(weights)]
    ]
    assert found == weights


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(vectors())


def class_weights(settings: Settings) -> Recipe:
    """A count that is found in the losses, of weights whose sums are rounded."""

    def uneven(model: nn.Module, batch: Any) -> LossSum:
        found = weighted(model, batch)
        share = batch[0].abs().sqrt().sum()
        return replace(found, count=found.count + share, metrics={"share": (share, 1.0)})

    data = Data(vectors())
    return recipe(
        settings,
        model=plain,
        loss=uneven,
        train_data=lambda: data,
        eval_data=lambda: {"kept": vectors(50), "read": Stream()},
    )


def known_weights(settings: Settings) -> Recipe:
    """The same count, told before the forward pass."""

    def count(batch: Any) -> float:
        return float(batch[0].abs().sqrt().sum())

    def shared(model: nn.Module, batch: Any) -> LossSum:
        return LossSum(
            cross_entropy(model(batch[0]), batch[1], reduction="sum"), batch[0].abs().sqrt().sum()
        )

    return recipe(
        settings, model=plain, loss=shared, train_data=lambda: Data(vectors(), count=count)
    )


@pytest.mark.parametrize("make", [class_weights, known_weights])
def test_12_micro_batches_and_a_count_that_is_rounded_are_the_same_bits_at_1_3_and_6_ranks(
    make: Any,
) -> None:
    """In float64, where the sums of records and evaluations are rounded as well."""
    assert not differing(
        make, exact(global_batch=24, micro_batch=2, precision="fp64"), world_sizes=(1, 3, 6)
    )


def two_objectives(settings: Settings) -> Recipe:
    return gan()


def test_a_gan_is_the_same_bits_at_1_and_4_ranks() -> None:
    assert not differing(
        two_objectives, exact(global_batch=24, micro_batch=3, grad_clip=0.2), world_sizes=(1, 4)
    )


class Routed(nn.Module):
    """Each micro-batch of 4 takes one of three branches, by its first input; the fourth is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.branches[int(inputs[0, 0] > 0) + int(inputs[0, 0] > 0.9)](inputs)


def routed(settings: Settings) -> Recipe:
    return recipe(
        settings,
        model=Routed,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1),
    )


def test_parameters_that_some_micro_batches_leave_out_are_the_same_bits_at_1_2_and_4_ranks() -> (
    None
):
    """AdamW decays what has a gradient, be it zero, and leaves alone what has none."""
    settings = exact(max_steps=12, find_unused_parameters=True)
    alone, *others = (lives(routed, settings, world_size=ranks)[0] for ranks in (1, 2, 4))
    for life in others:
        assert bits(life) == bits(alone)


# What it needs


def threads_in_a_session(settings: Settings) -> int:
    with session(settings, speaks=False):
        return torch.get_num_threads()


def test_a_rank_has_one_thread_unless_another_number_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    asked = [exact(), exact(threads=3), exact(exact=False)]
    assert [run_ranks(threads_in_a_session, 1, settings, group=False)[0] for settings in asked] == [
        1,
        3,
        2,
    ]


@pytest.mark.parametrize(
    ("world_size", "culprit"), [(2, 0), pytest.param(2, 1, marks=SLOW), (4, 2)]
)
def test_a_failing_or_killed_rank_ends_all_though_another_thread_waits_for_it(
    world_size: int, culprit: int, tmp_path: Path
) -> None:
    flags = [
        "--exact",
        "--global-batch",
        "8",
        "--micro-batch",
        str(8 // world_size),
        "--at-rank",
        str(culprit),
    ]
    (tmp_path / "killed").mkdir()
    failed = train("--fault", "loss", *flags, folder=tmp_path, world_size=world_size)
    assert failed.codes == [1] * world_size
    assert failed.status["reason"] == f"rank {culprit}: ValueError: the loss's own fault"
    killed = train("--fault", "SIGKILL", *flags, folder=tmp_path / "killed", world_size=world_size)
    assert killed.codes == [-signal.SIGKILL if rank == culprit else 1 for rank in range(world_size)]
    assert killed.status["reason"].startswith(
        f"a peer is gone that left no word (killed, or out of memory); not heard of: rank {culprit}"
    )


def test_cuda_is_deterministic_meanwhile_and_the_switches_are_put_back() -> None:
    def switches() -> tuple[Any, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )

    before = switches()
    with deterministic(True, torch.device("cuda")):
        assert switches() == (True, False, ":4096:8")
    assert switches() == before


# Refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"micro_batch": 0},
            r"--exact with --micro-batch 0: expected a stated size.*Type --micro-batch 4 for up to 8 ranks",
        ),
        ({"micro_batch": "auto"}, r"--exact with --micro-batch auto: .*Type --micro-batch 4 "),
        (
            {"micro_batch": 5},
            r"--exact with --micro-batch 5: .* divides --global-batch 32.*Type --micro-batch 4 ",
        ),
        ({"micro_batch": 0, "global_batch": 12}, r"Type --micro-batch 3 for up to 4 ranks"),
        ({"sync_batchnorm": True}, r"--exact with --sync-batchnorm"),
    ],
)
def test_settings_that_cannot_be_exact_are_refused_with_what_to_type(
    fields: dict[str, Any], message: str
) -> None:
    check(exact())
    with pytest.raises(ConfigError, match=message):
        check(exact(**fields))


@pytest.mark.ranks(3)
def test_world_sizes_that_do_not_fit_are_refused_with_those_that_do(group: Group) -> None:
    expected = (
        r"--exact: 32 / 4 = 8 micro-batches do not fit 3 ranks\. World sizes that fit: 1, 2, 4, 8\."
    )
    with pytest.raises(ConfigError, match=expected):
        build(recipe(exact()), exact(), group)
    settings = exact(
        global_batch=8
    )  # fewer micro-batches than ranks: these would be cut in another way
    with pytest.raises(
        ConfigError,
        match=r"8 / 4 = 2 micro-batches do not fit 3 ranks\. World sizes that fit: 1, 2\.",
    ):
        build(recipe(settings), settings, group)


def test_the_world_sizes_that_fit_hold_a_power_of_two_of_micro_batches_each() -> None:
    assert [fitting_world_sizes(number) for number in (1, 7, 8, 12)] == [
        [1],
        [1, 7],
        [1, 2, 4, 8],
        [1, 3, 6, 12],
    ]


@pytest.mark.ranks(1)
def test_a_stream_is_refused(group: Group) -> None:
    with pytest.raises(ConfigError, match="--exact: the training data is iterable"):
        build(recipe(exact(), train_data=Stream), exact(), group)
