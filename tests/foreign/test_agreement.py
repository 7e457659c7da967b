"""What must be equal on all ranks is compared at each save and evaluation; a difference names tensor and rank."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Counting, Settings, plain, recipe, vectors
from torch import nn

from ddp_kit import Data, restore, save, train_step
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import DdpKitError
from ddp_kit.setup.build import build
from ddp_kit.testing import RanksError, run_ranks
from ddp_kit.train import run
from ddp_kit.training.agreement import checksum, digests_of, require_agreement


class Drifts:
    """A callback that writes into the model of one rank."""

    def __init__(self, change: Callable[[Any], None], *, rank: int, step: int):
        self.change, self.rank, self.step = change, rank, step

    def on_start(self, model: nn.Module) -> None:
        self.model = model

    def on_step(self, step: int) -> None:
        if step == self.step and read_topology().rank == self.rank:
            with torch.no_grad():
                self.change(self.model)

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def weight(model: Any) -> None:
    model[2].weight[0, 0] += 1e-7


def buffer(model: Any) -> None:
    model.still[1] = 2


def negative_zero(model: Any) -> None:
    model[0].bias[3] = -0.0


CHANGES = {
    "2.weight": (plain, weight),
    "still": (Counting, buffer),
}


def drifting(settings: Settings, name: str, rank: int, strategy: str) -> None:
    model, change = CHANGES[name]
    made = recipe(settings, model=model, eval_data=lambda: Data(vectors(10)))
    own = replace(settings, strategy=strategy)
    run(replace(made, callbacks=[Drifts(change, rank=rank, step=4)]), own)


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("every", ["save_every", "eval_every"])
def test_a_rank_that_holds_other_values_ends_the_run_before_a_checkpoint_is_committed(
    tmp_path: Path, name: str, every: str, strategy: str
) -> None:
    settings = Settings(max_steps=8, run_dir=str(tmp_path), micro_batch=4, **{every: 2})
    with pytest.raises(
        RanksError, match=rf"DIVERGED at step 4: rank 1 differs from the others in .*{name}"
    ):
        run_ranks(drifting, 3, settings, name, 1, strategy, group=False)
    assert 4 not in steps(LocalDisk(tmp_path / "checkpoints"))


@pytest.mark.ranks(2)
def test_a_loop_of_ones_own_is_compared_too(group: Group) -> None:
    made = build(recipe(Settings()), Settings(), group)
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    if group.rank == 1:
        with torch.no_grad():
            made.training.model[0].bias[3] += 1e-3
    with pytest.raises(
        DdpKitError, match=r"DIVERGED at step 2: ranks 0, 1 differ in 0\.bias \(1 of 4 tensors\)"
    ):
        require_agreement(made.training)


@pytest.mark.parametrize("numbers", [0, 1, 3, 5, 4096, 4097, 20_000])
def test_a_checksum_on_the_device_sees_one_bit_and_two_numbers_that_change_places(
    numbers: int,
) -> None:
    memory = torch.randn(numbers, generator=torch.Generator().manual_seed(1)).view(torch.uint8)
    memory = torch.cat([memory, torch.tensor([7, 9], dtype=torch.uint8)])
    before = int(checksum(memory))
    assert int(checksum(memory.clone())) == before
    for at in {0, len(memory) // 2, len(memory) - 1}:
        other = memory.clone()
        other[at] ^= 1
        assert int(checksum(other)) != before
    if numbers > 4:
        swapped = memory.clone().view(-1)
        words = swapped[: 4 * numbers].view(torch.int32)
        words[:2] = words[[1, 0]]
        assert int(checksum(swapped)) != before


def test_memory_formats_and_views_have_checksums_of_their_values() -> None:
    image = torch.randn(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    assert digests_of([last]) == digests_of([last.clone()])
    assert digests_of([image[:, 1]]) == digests_of([image[:, 1].clone()])
    assert digests_of([torch.view_as_complex(torch.ones(3, 2)).conj()]) != digests_of(
        [torch.view_as_complex(torch.ones(3, 2))]
    )


class Starts(nn.Module):
    """Weights or a buffer that change for the first time in the middle of the run, in ways of which there is no sign."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.head = nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(6))
        self.warm = False
        self.rate = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            if self.calls > 2:
                self._change(x.detach())
        return self.head(x - self.centre) * self.rate + self.frozen(x)

    def _change(self, x: torch.Tensor) -> None:
        if self.what == "by data":
            self.centre.data.add_(x.mean(0))
        elif self.what == "frozen":
            self.frozen.bias += x.mean()
        elif self.what == "attribute":
            self.rate *= 0.9


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("by data", r"centre is changed by `.data`, .*Recipe\(buffers="),
        ("frozen", r"changes the weight frozen\.bias, as it did not before the first step"),
    ],
)
def test_what_begins_to_change_without_a_sign_ends_the_run_at_the_next_look(
    group: Group, what: str, message: str
) -> None:
    settings = Settings(micro_batch=4, max_steps=8)
    made = build(recipe(settings, model=lambda: Starts(what)), settings, group)
    with pytest.raises(DdpKitError, match=message):
        for batch in made.feed.batches(start=0, end=8):
            train_step(made.training, batch)
            if made.training.step in (2, 4):
                require_agreement(made.training)


@pytest.mark.ranks(1, 2)
def test_an_attribute_that_begins_to_change_is_kept_from_the_next_look_on(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=8)
    made = build(recipe(settings, model=lambda: Starts("attribute")), settings, group)
    for batch in made.feed.batches(start=0, end=8):
        train_step(made.training, batch)
        require_agreement(made.training)
    assert made.training.forward_state.attributes.saved().keys() == {"rate"}


@pytest.mark.ranks(1, 2)
def test_what_the_first_step_alone_has_changed_is_seen_after_it(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=2)
    made = build(recipe(settings, model=lambda: Starts("attribute")), settings, group)
    made.training.model.calls += 5
    for batch in made.feed.batches(start=0, end=1):
        train_step(made.training, batch)
    assert not made.training.forward_state.attributes.saved()
    made.training.after_first_step()
    assert made.training.forward_state.attributes.saved().keys() == {"rate"}


def own_loop(folder: str, steps: int) -> tuple[int, float, list[float]]:
    import ddp_kit

    with ddp_kit.process_group(device="cpu") as group:
        torch.manual_seed(0)
        model: Any = Starts("attribute")
        feed = ddp_kit.build_loader(Data(vectors()), group=group, global_batch=24, micro_batch=4)
        optimizer = torch.optim.SGD([*model.head.parameters()], lr=0.1)
        from cases import classify

        training = ddp_kit.wrap(
            model,
            optimizer,
            classify,
            group=group,
            feed=feed,
            buffers={"centre": "own"},
        )
        restore(training, folder)
        for batch in feed.batches(start=training.step, end=steps):
            train_step(training, batch)
        save(training, folder)
        return training.step, model.rate, model.head.bias.tolist()


def test_a_loop_of_ones_own_saves_and_restores_what_training_changes(tmp_path: Path) -> None:
    whole = run_ranks(own_loop, 2, str(tmp_path / "whole"), 6, group=False)[0]
    run_ranks(own_loop, 1, str(tmp_path / "cut"), 3, group=False)
    resumed = run_ranks(own_loop, 2, str(tmp_path / "cut"), 6, group=False)[0]
    assert resumed[0] == whole[0] == 6
    assert resumed[1] < 1
