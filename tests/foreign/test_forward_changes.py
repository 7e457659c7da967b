"""Weights and buffers that the forward pass changes: the numbers of bare torch, and the same on any number of ranks."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases import Settings, Trace, distance, recipe, trace, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import TensorDataset

from ddp_kit import Data
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.testing import assert_same_on_all_ranks

Model = Callable[[], nn.Module]


def alone(made: Any, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


def floats(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in state.items()}


def bare(
    model: Model, settings: Settings, *, micro_batch: int = 0, data: TensorDataset | None = None
) -> dict[str, torch.Tensor]:
    """Trains by hand in one process; with a micro-batch, each of a step starts from what the step before has left, and the first one's changes stay."""
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = model().double()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=settings.lr, momentum=settings.momentum)
    inputs, labels = (data or vectors()).tensors
    if inputs.is_floating_point():
        inputs = inputs.double()
    for step in range(settings.max_steps):
        epoch, k = divmod(step, 240 // settings.global_batch)
        order = permutation(settings.seed, epoch, 240)[24 * k : 24 * (k + 1)]
        optimizer.zero_grad()
        base = {name: value.clone() for name, value in net.state_dict().items()}
        first: dict[str, torch.Tensor] = {}
        for part in torch.from_numpy(order).split(micro_batch or 24):
            net.load_state_dict(base)
            loss = cross_entropy(net(inputs[part]), labels[part], reduction="sum") / 24
            first = first or {name: value.clone() for name, value in net.state_dict().items()}
            loss.backward()
        net.load_state_dict(first)
        optimizer.step()
    return dict(net.state_dict())


class Words(nn.Module):
    """Rows that are looked up are scaled down in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6, max_norm=1.0)
        self.head = nn.Linear(6, 4)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(words).mean(1))


class ByFunction(Words):
    """The same without the module."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 6)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(words, self.table.weight, max_norm=1.0)
        return self.head(rows.mean(1))


def sentences() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(0, 30, (240, 2), generator=generator)
    return TensorDataset(words, words.sum(1) % 4)


class ActNorm(nn.Module):
    """Scale and shift take their first values from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.register_buffer("is_ready", torch.tensor(False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_ready:
            self.shift.data = -x.mean(0).detach()
            self.scale.data.copy_(1 / (x.std(0).detach() + 1e-3))
            self.is_ready.fill_(True)
        return (x + self.shift) * self.scale


def flow() -> nn.Module:
    return nn.Sequential(ActNorm(), nn.Linear(6, 4))


class ByFlag(ActNorm):
    """The flag is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        del self.is_ready
        self.is_ready = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-3))
            self.is_ready = True
        return (x + self.shift) * self.scale


def flagged_flow() -> nn.Module:
    return nn.Sequential(ByFlag(), nn.Linear(6, 4))


class Teacher(nn.Module):
    """A frozen copy follows the student, as in BYOL and DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(6, 4)
        self.teacher = nn.Linear(6, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            for own, other in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                own.data.mul_(0.9).add_(other.data, alpha=0.1)
        return self.student(x) + 0.1 * self.teacher(x)


class MaxNorm(nn.Linear):
    """A constraint on the weights, put on in the forward pass, as in EEGNet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
        return super().forward(x)


def constrained() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), MaxNorm(6, 4))


def spectral() -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 4))


def old_spectral() -> nn.Module:
    """The hooks of before parametrizations: they keep what they compute in plain attributes."""
    last = nn.Linear(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(last)
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), last)


class Later(nn.Module):
    """A buffer that changes only once some batches were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
            if self.seen > 2:
                self.centre = 0.5 * self.centre + 0.5 * x.mean(0).detach()
        return self.head(x - self.centre)


HABITS: dict[str, tuple[Model, Callable[[], TensorDataset]]] = {
    "words": (Words, sentences),
    "words by function": (ByFunction, sentences),
    "first values": (flow, vectors),
    "first values by a flag": (flagged_flow, vectors),
    "teacher": (Teacher, vectors),
    "constraint": (constrained, vectors),
    "spectral norm": (spectral, vectors),
    "old spectral norm": (old_spectral, vectors),
    "later": (Later, vectors),
}


def of_habit(settings: Settings, name: str) -> Any:
    model, data = HABITS[name]
    return recipe(settings, model=model, train_data=lambda: Data(data()))


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", HABITS)
def test_one_micro_batch_gives_the_weights_and_buffers_of_bare_torch(
    group: Group, name: str
) -> None:
    settings = Settings(max_steps=8)
    ours = trace(group, of_habit(settings, name), settings)
    model, data = HABITS[name]
    theirs = bare(model, settings, data=data())
    assert distance(floats(ours.state), floats(theirs)) <= 1e-12


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", HABITS)
def test_the_ranks_give_the_weights_and_buffers_of_one(group: Group, name: str) -> None:
    settings = Settings(max_steps=8, micro_batch=4)
    ours = trace(group, of_habit(settings, name), settings)
    one = alone(of_habit(settings, name), settings)
    assert distance(floats(ours.state), floats(one.state)) <= 1e-12
    assert distance(ours.gradient, one.gradient) <= 1e-12
    assert_same_on_all_ranks(ours.state, group)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", ["first values", "teacher", "spectral norm", "later"])
def test_each_micro_batch_of_a_step_starts_from_the_same_values(group: Group, name: str) -> None:
    settings = Settings(max_steps=8, micro_batch=4)
    ours = trace(group, of_habit(settings, name), settings)
    theirs = bare(HABITS[name][0], settings, micro_batch=4)
    assert distance(floats(ours.state), floats(theirs)) <= 1e-12


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", ["words", "words by function"])
def test_rows_that_any_micro_batch_looks_up_are_scaled_down(group: Group, name: str) -> None:
    settings = Settings(max_steps=8, micro_batch=4)
    ours = trace(group, of_habit(settings, name), settings)
    # A row depends on no micro-batch: the whole batch at once gives the same.
    theirs = bare(HABITS[name][0], settings, data=sentences())
    assert distance(floats(ours.state), floats(theirs)) <= 1e-12
