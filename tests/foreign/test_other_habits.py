"""Further habits of other people's models, each the same on two ranks as on one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Settings, Trace, classify, distance, recipe, trace, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD
from torch.utils.data import TensorDataset

from ddp_kit import Data, LossSum, Objective, Recipe
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import build
from ddp_kit.training.step import train_step


def alone(made: Any, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in state.items()}


class Renorm(nn.BatchNorm1d):
    """Assigns its statistics, in place of writing into them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * x.mean(0).detach()
            self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - self.running_mean) * self.weight + self.bias


def renormed() -> nn.Module:
    return nn.Sequential(Renorm(6), nn.Linear(6, 4))


class Queue(nn.Module):
    """MoCo's: a ring of keys and where to write next."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("queue", torch.zeros(12, 6))
        self.register_buffer("at", torch.zeros(1, dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x + self.queue.mean(0).clone())
        if self.training:
            at = int(self.at)
            self.queue[at : at + 4] = x[:4].detach()
            self.at[0] = (at + 4) % 12
        return out


class Codebook(nn.Module):
    """A VQ-VAE's: codes follow sums and counts that are averaged exponentially."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("codes", torch.randn(5, 6))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(x, self.codes).argmin(1)
        codes = self.codes[nearest]
        if self.training:
            one_hot = nn.functional.one_hot(nearest, 5).to(x.dtype)
            with torch.no_grad():
                self.counts.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(one_hot.T @ x, alpha=0.1)
                self.codes = self.sums / (self.counts[:, None] + 1e-5)
        return self.head(x + codes)


class Observer(nn.Module):
    """Resizes its buffers in place, as quantisation's observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("low", torch.tensor([]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            low = x.detach().amin(0)
            if self.low.numel():
                low = torch.minimum(low, self.low)
            self.low.resize_(low.shape)
            self.low.copy_(low)
        return self.head(x - self.low)


class TiedWords(nn.Module):
    """One table for words in and out, kept to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6, max_norm=1.0)
        self.out = nn.Linear(6, 12, bias=False)
        self.out.weight = self.table.weight
        self.alias = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x[:, :1].abs() * 5).long() % 12
        return self.out(self.table(words).mean(1))[:, :4]


class SharedBuffer(nn.Module):
    """One tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("one", torch.zeros(6))
        self.register_buffer("other", self.one)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.one += x.mean(0).detach()
        return self.head(x + self.other / 9)


class Decaying(nn.Module):
    """A rate as a number, and one of NumPy, deep inside."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.inner = nn.ModuleDict({"a": nn.Identity()})
        self.inner["a"].schedule = {"rate": 1.0, "seen": [0]}  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        schedule: Any = self.inner["a"].schedule
        if self.training:
            schedule["rate"] *= 0.9
            schedule["seen"].append(len(x))
            if len(schedule["seen"]) > 3:
                del schedule["seen"][0]
        return self.head(x) * schedule["rate"] + sum(schedule["seen"]) / 100


HABITS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "assigned statistics": (renormed, {}),
    "queue": (Queue, {}),
    "codebook": (Codebook, {"sums": "mean", "counts": "mean", "codes": "mean"}),
    "observer": (Observer, {}),
    "tied words": (TiedWords, {}),
    "shared buffer": (SharedBuffer, {}),
    "shared buffer, averaged": (SharedBuffer, {"*": "mean"}),
    "rate": (Decaying, {}),
}


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", HABITS)
def test_the_ranks_give_what_one_gives(group: Group, name: str) -> None:
    model, words = HABITS[name]
    for ema in (0.0, 0.5):
        settings = Settings(max_steps=6, micro_batch=4, ema=ema)
        made = recipe(settings, model=model, buffers=words)
        ours = trace(group, made, settings)
        one = alone(made, settings)
        assert distance(floats(ours.state), floats(one.state)) <= 1e-12
        assert ours.losses == pytest.approx(one.losses, abs=1e-12)


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", HABITS)
def test_one_micro_batch_is_bare_torch(group: Group, name: str) -> None:
    from ddp_kit.data.seeding import Purpose, key, permutation

    model, words = HABITS[name]
    settings = Settings(max_steps=6)
    ours = trace(group, recipe(settings, model=model, buffers=words), settings)
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = model().double()
    optimizer = SGD(net.parameters(), lr=settings.lr, momentum=settings.momentum)
    inputs, labels = vectors().tensors
    for step in range(6):
        part = torch.from_numpy(permutation(0, 0, 240)[24 * step : 24 * step + 24])
        optimizer.zero_grad()
        cross_entropy(net(inputs[part].double()), labels[part]).backward()
        optimizer.step()
    assert distance(floats(ours.state), floats(dict(net.state_dict()))) <= 1e-12


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.critic = nn.Sequential(
            spectral_norm(nn.Linear(6, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 1))
        )
        self.steps = 0


def critic_loss(model: Any, batch: Any) -> LossSum:
    real, _ = batch
    model.steps += 1
    fake = model.generator(torch.randn_like(real)).detach()
    return LossSum((model.critic(fake) - model.critic(real)).sum(), len(real))


def generator_loss(model: Any, batch: Any) -> LossSum:
    real, _ = batch
    scale = 1 / (1 + model.steps)
    return LossSum(-model.critic(model.generator(torch.randn_like(real))).sum() * scale, len(real))


@pytest.mark.ranks(2)
def test_a_gan_with_spectral_norms_and_a_counter_in_its_loss(group: Group) -> None:
    settings = Settings(max_steps=5, micro_batch=4)

    def sgd(part: Any) -> Any:
        return SGD(part.parameters(), lr=0.05)

    made = Recipe(
        model=Gan,
        train_data=lambda: Data(vectors()),
        objectives=[
            Objective(loss=critic_loss, optimizer=sgd, trains="critic"),
            Objective(loss=generator_loss, optimizer=sgd, trains="generator"),
        ],
    )

    def state(group: Group) -> dict[str, torch.Tensor]:
        found = build(made, settings, group)
        for batch in found.feed.batches(start=0, end=5):
            train_step(found.training, batch)
        assert found.training.model.steps == 5
        return floats(dict(found.training.model.state_dict()))

    ours = state(group)
    with process_group(topology=Topology(), device="cpu") as one:
        assert distance(ours, state(one)) <= 1e-12


class Images(nn.Module):
    """Everything that the trial of memory formats could leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.head = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.zeros(4))
        self.passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x.view(-1, 1, 2, 3).repeat(1, 1, 2, 2))
        if not self.passes:
            self.scale.data.copy_(1 / x.detach().std())
        self.passes += 1
        return self.head(x.mean((2, 3)) * self.scale)


@pytest.mark.ranks(1, 2)
def test_the_trials_of_memory_format_and_size_leave_no_trace(group: Group) -> None:
    for micro_batch in ("auto", 4):
        settings = Settings(micro_batch=micro_batch)
        model: Any = build(recipe(settings, model=Images), settings, group).training.model
        assert model.passes == 0
        assert not model.scale.any()


def changing_words() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(12, 6, max_norm=1.0), nn.Linear(6, 4))


def words() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(
        torch.randint(0, 12, (240, 3), generator=generator), torch.zeros(240, dtype=torch.long)
    )


@pytest.mark.ranks(1, 2)
def test_weights_that_a_pass_changes_are_refused_where_ranks_hold_parts_of_them(
    group: Group,
) -> None:
    settings = Settings(strategy="fsdp", precision="fp32")
    for model, data in ((changing_words, words), (Images, vectors)):
        made = recipe(
            settings, model=model, train_data=lambda data=data: Data(data()), loss=classify
        )
        with pytest.raises(ConfigError, match=r"changes the weights .*--strategy ddp, or zero1"):
            build(made, settings, group)


class Seen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 4)
        self.register_buffer("seen", torch.zeros(6))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = 0.5 * self.seen + x.mean(0).detach()
        self.calls += 1
        return super().forward(x)


@pytest.mark.ranks(1, 2)
def test_checkpointed_activations_change_buffers_once(group: Group) -> None:
    for micro_batch in (0, 4):
        settings = Settings(micro_batch=micro_batch, max_steps=4)
        own = replace(settings, activation_checkpointing="Seen")
        kept = trace(group, recipe(settings, model=lambda: nn.Sequential(Seen())), settings)
        again = trace(group, recipe(own, model=lambda: nn.Sequential(Seen())), own)
        assert distance(floats(again.state), floats(kept.state)) <= 1e-12
