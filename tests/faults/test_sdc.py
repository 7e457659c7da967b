"""`--sdc-check`: a rank whose chip gives other bits now and then is named, and looking for it leaves no trace."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_runs import Ended, Fault, lines, trained_as
from cases import Counting, Settings, normed, recipe, weighted
from torch import nn

from ddp_kit import LossSum
from ddp_kit.distributed.topology import read_topology
from ddp_kit.testing import run_ranks
from ddp_kit.training import alone, computed_twice
from ddp_kit.training.alone import Alone

SLOW = [pytest.mark.slow, pytest.mark.steady]
BASE = Settings(max_steps=6, micro_batch=4, precision="fp32", ema=0.5)
MODELS = {"normed": normed, "counting": Counting}


class Chip:
    """Computes as the model says, but flips the lowest bit of one gradient of a rank: at these passes of the run."""

    def __init__(self, rank: int, passes: set[int]) -> None:
        self.rank, self.passes, self.now = rank, passes, 0

    def __call__(self, *given: Any) -> Alone:
        found = alone.computed_alone(*given)
        self.now += 1
        if self.rank in (-1, read_topology().rank) and self.now in self.passes:
            gradient = found.gradients[1]
            assert gradient is not None
            gradient.view(torch.int32)[2] ^= 1
        return found


def computed(settings: Settings, name: str, rank: int = 0, passes: tuple[int, ...] = ()) -> Ended:
    chip = Chip(rank, set(passes))
    computed_twice.computed_alone = chip  # type: ignore[assignment]  # in this forked process alone
    fault = Fault()
    loss = weighted if name == "normed" else fault.loss
    made = recipe(settings, model=MODELS[name], loss=loss, callbacks=[fault])
    ended = trained_as(made, settings, fault, [])
    return replace(ended, seen=[*ended.seen, chip.now])


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("normed", 2), pytest.param("counting", 1, marks=SLOW), pytest.param("normed", 1, marks=SLOW)],
)
def test_a_run_with_the_check_gives_the_bits_of_one_without(
    tmp_path: Path, name: str, world_size: int
) -> None:
    found = []
    for every in (0, 2):
        settings = replace(BASE, sdc_check=every, run_dir=str(tmp_path / str(every)))
        found += run_ranks(computed, world_size, settings, name, group=False)
    assert {end.error for end in found} == {""}
    assert len({end.digest for end in found}) == 1
    assert [end.seen[-1] for end in found] == [0] * world_size + [6] * world_size
    losses = [
        [record["loss"] for record in lines(tmp_path / every / "metrics.jsonl")]
        for every in ("0", "2")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("rank", "world_size"), [(1, 3), pytest.param(0, 2, marks=SLOW), pytest.param(0, 1, marks=SLOW)]
)
def test_a_single_bit_that_one_pass_has_otherwise_names_rank_host_and_result(
    tmp_path: Path, rank: int, world_size: int
) -> None:
    settings = replace(BASE, sdc_check=2, run_dir=str(tmp_path))
    found = run_ranks(computed, world_size, settings, "normed", rank, (4,), group=False)
    for end in found:
        assert end.error.startswith(f"MISCALCULATED at step 4: rank {rank} (host ")
        assert "8 times from the same data, weights and draws, and 1 times" in end.error
        assert "in the gradient of 0.bias (1 of 7 results)" in end.error
    assert found[0].seen[:3] == [1, 2, 3]
    assert found[0].of("failure")[0]["step"] == 3


def unsteady(settings: Settings) -> Ended:
    """A loss with an operation that gives other bits each time."""
    source = torch.Generator().manual_seed(read_topology().rank)
    fault = Fault()

    def loss(model: nn.Module, batch: Any) -> LossSum:
        result = fault.loss(model, batch)
        noise = torch.rand((), generator=source) * 1e-3
        return LossSum(result.total * (1 + noise), result.count)

    return trained_as(recipe(settings, loss=loss, callbacks=[fault]), settings, fault, [])


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=SLOW), 2])
def test_an_operation_that_is_not_deterministic_is_no_chip(tmp_path: Path, world_size: int) -> None:
    settings = replace(BASE, sdc_check=2, run_dir=str(tmp_path))
    found = run_ranks(unsteady, world_size, settings, group=False)
    assert {end.error for end in found} == {""}
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "--sdc-check is off from step 2 on: rank 0 (host " in log
    assert "an operation that is not deterministic" in log
