"""Passes that are none of training's leave no trace; plain attributes and buffers go on where they were."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, Trace, classify, distance, recipe, trace, vectors
from lives import live, lives
from torch import nn

from ddp_kit import Data
from ddp_kit.data.seeding import generators_put_back
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError
from ddp_kit.model_state.untouched import Snapshot, untouched
from ddp_kit.setup.build import build
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step


def alone(made: Any, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


# Leave no trace


class Everything(nn.Module):
    """Changes all that a module can have, in each pass and in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("in_place", torch.zeros(6))
        self.register_buffer("assigned", torch.zeros(6))
        self.register_buffer("by_data", torch.zeros(6))
        self.register_buffer("empty", None)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.calls = 0
        self.scale = 1.0
        self.name = "new"
        self.last: Any = None
        self.shapes: list[Any] = [(1, 2), {"a": 1}]
        self.counts = {"calls": 0}
        self.kinds = {"none"}
        self.window: deque[float] = deque([0.0], maxlen=3)
        self.meter = SimpleNamespace(sum=0.0, last=[])
        self.seen = np.zeros(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.meter.sum += len(x)
        self.meter.last.append(len(x))
        self.meter.fresh = 1
        self.seen[0] += 1
        with torch.no_grad():
            self.in_place += x.mean(0)
            self.assigned = self.assigned + 1
            self.by_data.data = torch.ones_like(self.by_data)
            self.empty = x.mean(0)
            self.cache = torch.zeros(len(x))
            self.frozen.weight.data.mul_(0.5)
            self.frozen.bias.add_(1)
        if not hasattr(self, "later"):
            self.register_buffer("later", torch.zeros(2), persistent=False)
        self.calls += 1
        self.scale *= 0.5
        self.name = "used"
        self.last = len(x)
        self.shapes[1]["a"] += 1
        self.shapes.append(tuple(x.shape))
        self.counts["calls"] += 1
        self.kinds.add("some")
        self.window.append(float(len(x)))
        self.fresh = 1
        return self.head(x)


def everything(model: Any) -> dict[str, Any]:
    plain = {
        key: repr(value)
        for key, value in vars(model).items()
        if not key.startswith("_") and not isinstance(value, torch.Tensor)
    }
    tensors = {name: tensor.tolist() for name, tensor in model.named_buffers()}
    tensors |= {name: tensor.tolist() for name, tensor in model.named_parameters()}
    return plain | tensors | {"persistent": list(model.state_dict())}


@pytest.mark.ranks(1, 2)
def test_the_passes_before_the_first_step_leave_no_trace(group: Group) -> None:
    settings = Settings(micro_batch=4)
    seen: list[Any] = []

    def model() -> nn.Module:
        made = Everything()
        seen.append(everything(made.double()))
        return made

    random.seed(5)
    np.random.seed(5)
    with generators_put_back():
        expected = (random.random(), np.random.random(), torch.rand(()).item())
    made = build(
        recipe(settings, model=model, eval_data=lambda: Data(vectors(10))), settings, group
    )
    assert everything(made.training.model) == seen[0]
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected
    assert all(parameter.grad is None for parameter in made.training.model.parameters())


PASSES: list[int] = []


class Counted(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        PASSES.append(len(x))
        return super().forward(x)


def count_passes(settings: Settings) -> int:
    PASSES.clear()
    with process_group(device="cpu") as group:
        build(recipe(settings, model=lambda: Counted(6, 4)), settings, group)
    return len(PASSES)


def test_there_are_as_many_passes_before_the_first_step_on_any_number_of_ranks() -> None:
    settings = Settings(micro_batch=4)
    one, two = (
        run_ranks(count_passes, world_size, settings, group=False)[0] for world_size in (1, 2)
    )
    assert one == two


def test_a_trial_that_raises_leaves_no_trace_either() -> None:
    model = Everything()
    before = everything(model)
    with pytest.raises(RuntimeError, match="must match"), untouched(model):
        model(torch.zeros(3, 6))
        model(torch.zeros(3, 5))
    assert everything(model) == before


@pytest.mark.ranks(1, 2)
def test_an_evaluation_leaves_no_trace_and_each_micro_batch_of_it_finds_the_same(
    group: Group,
) -> None:
    modes = []

    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 4)
            self.table = nn.Embedding(4, 4, max_norm=0.1)
            self.register_buffer("sum", torch.zeros(4))
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes.append(self.training)
            self.calls += 1
            self.sum = self.sum + x.mean(0)[:4].detach()
            words = (x[:, 0] > 0).long() + self.calls % 2
            return self.head(x) + self.sum + self.table(words)

    settings = Settings(micro_batch=4, max_steps=2)
    made = build(
        recipe(settings, model=Carried, eval_data=lambda: Data(vectors(30))), settings, group
    )
    found = []
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
        before = Snapshot(made.training.model)
        modes.clear()
        found.append(made.evaluator(made.training.model))
        assert set(modes) == {False}
        changes = before.changes()
        assert not changes.places
        assert not changes.plain
    if group.world_size > 1:
        with process_group(topology=Topology(), device="cpu") as one:
            again = build(
                recipe(settings, model=Carried, eval_data=lambda: Data(vectors(30))), settings, one
            )
            for batch, expected in zip(again.feed.batches(start=0, end=2), found, strict=True):
                train_step(again.training, batch)
                assert again.evaluator(again.training.model) == pytest.approx(expected, abs=1e-12)


# Plain attributes


class Annealed(nn.Module):
    """A counter steers the forward pass, and a running centre is kept as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.calls = 0
        self.centre = [0.0] * 6
        self.window: deque[float] = deque(maxlen=3)
        self.counts: dict[int, int] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centre = torch.tensor(self.centre, dtype=x.dtype)
        temperature = 1 + 1 / (1 + self.calls + len(self.window))
        if self.training:
            self.calls += 1
            self.centre = (0.9 * centre + 0.1 * x.mean(0)).tolist()
            self.window.append(float(x.sum()))
            self.counts[self.calls % 3] = self.counts.get(self.calls % 3, 0) + 1
        return self.head(x - centre) / temperature + len(self.counts)


@pytest.mark.ranks(2)
def test_plain_attributes_are_the_same_on_any_number_of_ranks(group: Group) -> None:
    settings = Settings(max_steps=6, micro_batch=4)
    ours = trace(group, recipe(settings, model=Annealed), settings)
    one = alone(recipe(settings, model=Annealed), settings)
    assert distance(ours.state, one.state) <= 1e-12
    assert ours.losses == pytest.approx(one.losses, abs=1e-12)


@pytest.mark.ranks(1)
def test_plain_attributes_are_those_of_bare_torch(group: Group) -> None:
    settings = Settings(max_steps=6)
    made = build(recipe(settings, model=Annealed), settings, group)
    model: Any = made.training.model
    for batch in made.feed.batches(start=0, end=6):
        train_step(made.training, batch)
    assert model.calls == 6
    assert model.counts == {0: 2, 1: 2, 2: 2}
    assert len(model.window) == 3
    assert any("calls" in note for note in made.training.notes)


def annealed(settings: Settings) -> Any:
    return recipe(settings, model=Annealed, eval_data=lambda: Data(vectors(10)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_plain_attributes_are_restored(tmp_path: Path, world_size: int) -> None:
    settings = Settings(max_steps=8, micro_batch=4, eval_every=4, save_every=4)
    whole = lives(annealed, settings, world_size=world_size)[0]
    own = replace(settings, run_dir=str(tmp_path / "run"), max_steps=4)
    run_ranks(live, 3 - world_size, annealed, own, group=False)
    on = replace(own, max_steps=8, change=("max_steps",))
    resumed = run_ranks(live, world_size, annealed, on, group=False)[0]
    assert resumed.step == 8
    assert distance(resumed.state, whole.state) <= 1e-12
    assert resumed.metrics == pytest.approx(whole.metrics, abs=1e-12)


class Hidden(nn.Module):
    """A hidden state as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.state: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.mean(0) if self.state is None else self.state
        self.state = (0.5 * state + 0.5 * x.mean(0)).detach()
        return self.head(x + state)


class HiddenList(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.state = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.append(x.mean(0).detach())
        return self.head(x + sum(self.state))


class HiddenInPlace(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(6).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x + self.state)
        self.state.mul_(0.5).add_(x.mean(0).detach())
        return out


class CacheBesideItsLength(Hidden):
    """The length would be restored and the cache would not."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.length < len(x):
            self.length = len(x)
            self.state = torch.ones(self.length, 1, dtype=x.dtype)
        return self.head(x * self.state[: len(x)])


class OwnGenerator(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.state = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + torch.randn(6, generator=self.state))


class OwnNumpy(OwnGenerator):
    def __init__(self) -> None:
        super().__init__()
        self.state = [np.random.default_rng(0)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.state[0].normal())


class Lazy(nn.Module):
    """Makes a layer in its first pass, of which the optimizer hears nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "inner"):
            self.inner = nn.Linear(6, 6).double()
        return self.head(self.inner(x))


class Schedule:
    """A schedule as an object, which counts itself."""

    def __init__(self) -> None:
        self.t = 0
        self.spans = {"warm": [5]}

    def rate(self) -> float:
        self.t += 1
        return 1 / (1 + self.t + len(self.spans))


class ByObject(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.state = Schedule()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) * self.state.rate()


class ByNamespace(Hidden):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"inner": SimpleNamespace(seen=torch.zeros(6).double())}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x + self.state["inner"].seen)
        self.state["inner"].seen += x.detach().mean(0)
        return out


class ByArray(Hidden):
    """Counts in an array, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.state = np.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state[len(x) % 4] += 1
        return self.head(x) / float(1 + self.state.sum())


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (Hidden, r"has left in state, .*register_buffer"),
    (HiddenList, r"has left in state, .*register_buffer"),
    (HiddenInPlace, r"has left in state, .*register_buffer"),
    (CacheBesideItsLength, r"has left in state, .*register_buffer"),
    (ByObject, r"has left in state, .*register_buffer"),
    (ByNamespace, r"has left in state, .*register_buffer"),
    (ByArray, r"has left in state, .*register_buffer"),
    (OwnGenerator, r"draws from a generator of its own, state"),
    (OwnNumpy, r"draws from a generator of its own, state"),
    (Lazy, r"the forward pass makes inner"),
]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(("model", "message"), REFUSED)
def test_what_no_checkpoint_can_hold_is_refused_by_name(
    group: Group, model: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(recipe(Settings(), model=model), Settings(), group)


class Looked(nn.Module):
    """Leaves tensors for whoever looks, as models with attention maps and auxiliary losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.seen: list[torch.Tensor] = []
        self.auxiliary: Any = None
        self.meter = SimpleNamespace(sum=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.head(x)
        self.meter.sum += float(out.detach().sum())
        self.auxiliary = 0.1 * out.square().sum()
        self.seen = [out.detach()]
        return out


def with_auxiliary(model: Any, batch: Any) -> Any:
    found = classify(model, batch)
    return replace(found, total=found.total + model.auxiliary)


@pytest.mark.ranks(1, 2)
def test_tensors_that_no_later_pass_reads_are_left_alone(group: Group) -> None:
    settings = Settings(micro_batch=4)
    ours = trace(group, recipe(settings, model=Looked, loss=with_auxiliary), settings)
    assert len(ours.losses) == 3
