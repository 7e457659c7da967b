"""`Recipe(buffers=...)`: what stays of a buffer that the forward pass changes is what the word says."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, Trace, distance, recipe, trace, vectors
from lives import Life, live
from torch import nn

from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.logs import logger
from ddp_kit.setup.build import build
from ddp_kit.testing import RanksError, assert_same_on_all_ranks, run_ranks
from ddp_kit.training.step import train_step


def alone(made: Any, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


class Kept(nn.Module):
    """One buffer for each word, which go into what the model answers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("sum", torch.zeros(6))
        self.register_buffer("first", torch.zeros(6))
        self.register_buffer("turn", torch.zeros(6, dtype=torch.complex64))
        self.prototype = nn.Parameter(torch.zeros(6), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("still", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.detach().mean(0)
        with torch.no_grad():
            self.mean = 0.5 * self.mean + 0.5 * mean
            self.sum += mean
            self.first.copy_(0.5 * self.first + 0.5 * mean)
            self.turn += mean * 1j
            self.prototype.data.lerp_(mean, 0.5)
            self.count += 1
        shift = self.mean + self.first + self.prototype + self.turn.imag + self.sum / 9
        return self.head(self.norm(x) + shift)


WORDS = {
    "mean": "mean",
    "sum": "sum",
    "f*t": "first",
    "turn": "mean",
    "prototype": "mean",
    "still": "mean",
}


def kept(settings: Settings, words: Mapping[str, str] = WORDS) -> Any:
    return recipe(settings, model=Kept, buffers=words)


@pytest.mark.ranks(1, 2, 3)
def test_each_word_keeps_what_it_says_of_all_micro_batches(group: Group) -> None:
    for micro_batch in (0, 4, 5):
        settings = Settings(micro_batch=micro_batch, max_steps=4)
        ours = trace(group, kept(settings), settings).state
        assert_same_on_all_ranks(ours, group)
        plan = plan_batches(24, micro_batch=micro_batch, world_size=group.world_size)
        inputs = vectors().tensors[0].double()
        mean = torch.zeros(6).double()
        total = torch.zeros(6).double()
        first = torch.zeros(6).double()
        turn = torch.zeros(6).double()
        for step in range(4):
            order = permutation(0, 0, 240)[step * 24 : (step + 1) * 24]
            means = [
                inputs[order[start:stop]].mean(0)
                for start, stop in zip(plan.bounds, plan.bounds[1:], strict=False)
            ]
            mean = 0.5 * mean + 0.5 * torch.stack(means).mean(0)
            total = total + torch.stack(means).sum(0)
            first = 0.5 * first + 0.5 * means[0]
            turn = turn + torch.stack(means).mean(0)
        for name, expected in (
            ("mean", mean),
            ("prototype", mean),
            ("sum", total),
            ("first", first),
            ("turn", turn * 1j),
        ):
            assert torch.allclose(ours[name], expected, atol=1e-12), (name, micro_batch)
        assert int(ours["count"]) == 4
        assert not ours["still"].any()


@pytest.mark.ranks(2, 3)
def test_with_every_word_the_ranks_give_the_numbers_of_one(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=6)
    ours = trace(group, kept(settings), settings)
    one = alone(kept(settings), settings)
    floats = [
        {
            name: torch.view_as_real(value) if value.is_complex() else value.double()
            for name, value in state.items()
        }
        for state in (ours.state, one.state)
    ]
    assert distance(*floats) <= 1e-12


def bits(settings: Settings) -> dict[str, bytes]:
    with process_group(device="cpu", threads=1) as group:
        state = trace(group, kept(settings), settings).state
    return {name: value.numpy().tobytes() for name, value in state.items()}


def test_exact_runs_keep_the_same_bits_on_any_number_of_ranks() -> None:
    settings = Settings(
        global_batch=32, micro_batch=4, max_steps=4, precision="fp32", exact=True, threads=1
    )
    found = [run_ranks(bits, ranks, settings, group=False) for ranks in (1, 2, 4)]
    for ranks in found:
        for own in ranks:
            assert own == found[0][0]


class Recurrent(nn.Module):
    """A hidden state is carried from batch to batch, as in truncated back-propagation."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(6, 8)
        self.head = nn.Linear(8, 4)
        self.register_buffer("hidden", torch.zeros(1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.cell(x, self.hidden.expand(len(x), 8))
        self.hidden = state.detach()
        return self.head(state)


class Stateful(Recurrent):
    """The same in place, one state for all samples of a micro-batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.cell(x, self.hidden.expand(len(x), 8).clone())
        with torch.no_grad():
            self.hidden.copy_(state.mean(0))
        return self.head(state)


def recurrent(settings: Settings) -> Any:
    return recipe(settings, model=Recurrent, buffers={"hidden": "own"})


def stateful(settings: Settings) -> Any:
    return recipe(settings, model=Stateful, buffers={"hid*": "own"})


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("make", [recurrent, stateful])
def test_each_micro_batch_goes_on_with_its_own(group: Group, make: Any) -> None:
    settings = Settings(micro_batch=4, max_steps=5)
    ours = trace(group, make(settings), settings)
    model = make(settings).model()
    torch.manual_seed(0)
    made = build(make(settings), settings, group)
    # By hand: six models that share their weights, each with a state of its own.
    twin = build(make(settings), settings, group).training.model
    assert type(model) is type(twin)
    assert not made.training.model.hidden.any()
    optimizer = torch.optim.SGD(twin.parameters(), lr=settings.lr, momentum=settings.momentum)
    inputs, labels = vectors().tensors
    states: dict[int, torch.Tensor] = {}
    losses = []
    for step in range(5):
        order = permutation(0, 0, 240)[step * 24 : (step + 1) * 24]
        optimizer.zero_grad()
        total = 0.0
        for slot in range(6):
            part = order[slot * 4 : slot * 4 + 4]
            twin.hidden = states.get(slot, torch.zeros(1, 8).double())
            loss = nn.functional.cross_entropy(
                twin(inputs[part].double()), labels[part], reduction="sum"
            )
            (loss / 24).backward()
            states[slot] = twin.hidden.clone()
            total += loss.item() / 24
        optimizer.step()
        losses.append(total)
    assert ours.losses == pytest.approx(losses, abs=1e-12)
    for name, value in twin.named_parameters():
        assert torch.allclose(ours.state[name], value, atol=1e-12), name
    assert not ours.state["hidden"].any()


def attempt(make: Any, settings: Settings, ranks: int, steps: int) -> Life:
    own = replace(settings, max_steps=steps, change=("max_steps", "micro_batch"))
    return run_ranks(live, ranks, make, own, group=False)[0]


@pytest.mark.parametrize("make", [recurrent, stateful])
def test_each_micro_batchs_own_is_saved_and_gone_on_from_by_any_number_of_ranks(
    tmp_path: Path, make: Any
) -> None:
    settings = Settings(micro_batch=4, save_every=3)
    whole = attempt(make, replace(settings, run_dir=str(tmp_path / "whole")), 1, 6)
    cut = replace(settings, run_dir=str(tmp_path / "cut"))
    attempt(make, cut, 3, 2)
    attempt(make, cut, 1, 3)
    resumed = attempt(make, cut, 2, 6)
    assert resumed.step == 6
    assert distance(resumed.state, whole.state) <= 1e-12


def test_another_number_of_micro_batches_cannot_go_on_with_their_own(tmp_path: Path) -> None:
    settings = Settings(micro_batch=4, save_every=3, run_dir=str(tmp_path))
    attempt(stateful, settings, 1, 3)
    with pytest.raises(RanksError, match=r"hidden of 6 micro-batches .* there are 3 now"):
        attempt(stateful, replace(settings, micro_batch=8), 1, 6)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"maen": "mean"}, r"no buffer of that name; did you mean 'mean'\?"),
        ({"x*": "mean"}, r"no buffer of that name; it has mean, sum, first"),
        ({"mean": "maen"}, r"expected 'mean' .*Did you mean 'mean'\?"),
        ({"count": "mean"}, r"it holds int64, of which 'first' or 'own' may stay"),
        ({"count": "sum"}, r"it holds int64"),
        ({"norm.running_mean": "first"}, r"is a running statistic, which is averaged anyway"),
        ({"head.*": "mean"}, r"head.weight is trained by an optimizer"),
        ({"prototype": "own"}, r"it is a frozen weight, of which 'mean' or 'first' may stay"),
        ({"m*": "mean", "*an": "sum"}, r"two patterns say 'mean' and 'sum' of mean"),
    ],
)
def test_a_word_that_cannot_be_is_refused(
    group: Group, words: Mapping[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kept(Settings(), words), Settings(), group)


@pytest.mark.ranks(1, 2)
def test_a_note_after_the_first_step_names_buffers_of_which_micro_batches_differ(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(micro_batch=4, max_steps=2)
    made = build(kept(settings, {"mean": "mean", "sum": "sum"}), settings, group)
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *args: said.append(text % args))
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    assert len(said) == 1
    assert "make different values" in said[0]
    assert "first, prototype, turn;" in said[0]
    assert "count" not in said[0]


@pytest.mark.ranks(1, 2)
def test_a_step_that_is_not_applied_leaves_everything_as_it_was(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=2, lr=1.0)
    made = build(recipe(settings, model=Kept, buffers=WORDS | {"count": "own"}), settings, group)
    model = made.training.model
    batches = made.feed.batches(start=0, end=2)
    train_step(made.training, next(batches))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
        before["norm.weight"] = model.norm.weight.clone()
    with pytest.raises(DdpKitError, match="not finite"):
        train_step(made.training, next(batches))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
