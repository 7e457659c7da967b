"""What models and optimizers of other people keep where bare torch does not look: it comes back, or is refused after the first step by name."""

import io
import json
import logging
import os
import signal
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, normed, recipe, vectors
from lives import live
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer

from ddp_kit import LossSum, Recipe, run, schedules
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.distributed.local_shard import local
from ddp_kit.errors import ConfigError
from ddp_kit.io.polling import wait_until
from ddp_kit.testing import RanksError, run_ranks, start_ranks

DEATH = 6  # after step 6, with checkpoints at 4 and 8
SETTINGS = Settings(max_steps=9, save_every=4, precision="fp32", lr=0.02)


# Models


class Scaled(nn.Module):
    """Keeps a scale and a history of amplitudes, as layers for fp8 do, and computes with both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 16)
        self.scale = 1.0
        self.history = torch.zeros(4)
        self.calls: list[float] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = self.linear(inputs) * self.scale
        return out + self.history.mean()

    def update(self, amplitude: float) -> None:
        self.calls.append(amplitude)
        self.scale = 1.0 + 0.01 * len(self.calls)
        self.history = torch.cat([self.history[1:], torch.tensor([0.01 * len(self.calls)])])

    def get_extra_state(self) -> Any:
        return {
            "scale": self.scale,
            "history": self.history,
            "calls": (len(self.calls), self.calls),
        }

    def set_extra_state(self, state: Any) -> None:
        self.scale, self.history = state["scale"], state["history"]
        number, self.calls = state["calls"]
        assert number == len(self.calls)


class Amplified(Scaled):
    """Notes amplitudes in its forward pass."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out = super().forward(inputs)
        if self.training:
            self.update(float(inputs.detach().abs().max()))
        return out

    def update(self, amplitude: float) -> None:
        super().update(amplitude)
        self.history[-1] += 0.01 * amplitude


class Model(nn.Module):
    def __init__(self, scaled: type[Scaled] = Scaled) -> None:
        super().__init__()
        self.first = scaled()
        self.last = nn.Linear(16, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(inputs)))


class Updates:
    """Updates the scale once a step, alike on all ranks."""

    def on_start(self, model: nn.Module) -> None:
        self.model = model

    def on_step(self, step: int) -> None:
        self.model.first.update(float(step))

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


# Optimizers


class Named(SGD):
    """Keeps what is no parameter's under a name, as some keep their step."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr, momentum=0.9)

    def step(self, closure: Any = None) -> None:
        common = self.state["common"]
        common["k"] = common.get("k", 0) + 1
        common["mean"] = common.get("mean", torch.zeros(3)) + common["k"]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1 / common["k"]).add_(common["mean"].mean() * 1e-3)
        super().step(closure)


class Numbered(SGD):
    """Keeps numbers as attributes."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr, momentum=0.9)
        self.k = 0
        self._seen: dict[str, Any] = {"norms": [], "last": None}

    def step(self, closure: Any = None) -> None:
        self.k += 1
        self._seen["last"] = self.k
        self._seen["norms"].append((self.k, float("inf")))
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1 / len(self._seen["norms"]) + 1 / self._seen["last"])
        super().step(closure)


class LookaheadOfSlow(Optimizer):
    """Keeps slow weights as an attribute, and has no state_dict of its own."""

    def __init__(self, inner: Optimizer):
        self.optimizer = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups
        self.steps = 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        self.steps += 1
        if self.steps % 3:
            return
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for parameter, own in zip(group["params"], slow, strict=True):
                own.lerp_(parameter, 0.5)
                parameter.copy_(own)


class Lookahead(Optimizer):
    """As a well-known package has it: without the base class's constructor, with the state of the optimizer within."""

    def __init__(self, inner: Optimizer):
        self._inner = inner
        self.param_groups = inner.param_groups
        self.defaults = inner.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.setdefault("lookahead_step", 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._inner.step()
        for group in self._inner.param_groups:
            group["lookahead_step"] += 1
            for parameter in group["params"]:
                kept = self._inner.state[parameter]
                if "slow" not in kept:
                    kept["slow"] = parameter.detach().clone()
                if group["lookahead_step"] % 3 == 0:
                    kept["slow"].lerp_(parameter, 0.5)
                    parameter.copy_(kept["slow"])

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)
        self.param_groups = self._inner.param_groups


class Wrapper(Optimizer):
    """Steps two others, each over some parameters, as Muon is used beside Adam."""

    def __init__(self, params: Any, lr: float):
        parameters = list(params)
        super().__init__(parameters, {"lr": lr})
        self.parts = [
            SGD([p for p in parameters if p.dim() > 1], lr=lr, momentum=0.9),
            Adam([p for p in parameters if p.dim() < 2], lr=lr),
        ]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()


class Based(Optimizer):
    """As SAM is written: its base optimizer shares the groups and keeps a state of its own."""

    def __init__(self, params: Any, base: type[Optimizer], **more: Any):
        super().__init__(params, more)
        self.base_optimizer = base(self.param_groups, **more)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("old", torch.zeros_like(parameter))
                kept.lerp_(parameter.grad, 0.5)
                parameter.grad.add_(kept)
        self.base_optimizer.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups


class Stateful(SGD):
    """Has a state_dict with more in it than torch's."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr, momentum=0.9)
        self.k, self.mean = 0, torch.zeros(2)

    def step(self, closure: Any = None) -> None:
        self.k += 1
        self.mean = self.mean + self.k
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(1 / self.k + float(self.mean.mean()) * 1e-3)
        super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"more": {"k": self.k, "mean": self.mean}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = dict(state)
        more = own.pop("more")
        self.k, self.mean = more["k"], more["mean"]
        super().load_state_dict(own)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "named": lambda parameters: Named(parameters, 0.02),
    "numbered": lambda parameters: Numbered(parameters, 0.02),
    "lookahead of slow weights": lambda parameters: LookaheadOfSlow(
        SGD(parameters, lr=0.02, momentum=0.9)
    ),
    "lookahead": lambda parameters: Lookahead(Adam(parameters, lr=0.02)),
    "wrapper": lambda parameters: Wrapper(parameters, 0.02),
    "based": lambda parameters: Based(parameters, SGD, lr=0.02, momentum=0.9),
    "stateful": lambda parameters: Stateful(parameters, 0.02),
}


def with_optimizer(settings: Settings, kind: str) -> Recipe:
    return recipe(settings, optimizer=lambda model: OPTIMIZERS[kind](model.parameters()))


def with_extra_state(settings: Settings, kind: str) -> Recipe:
    return recipe(settings, model=Model, callbacks=[Updates()])


def with_history(settings: Settings, kind: str) -> Recipe:
    return recipe(settings, model=lambda: Model(Amplified))


# Killed and resumed


class Death:
    """Kills a rank after a step, once the checkpoint before it is written."""

    def __init__(self, step: int, folder: Path):
        self.step = step
        self.saved = folder / "checkpoints" / "step-00000004"

    def on_start(self, model: nn.Module) -> None:
        pass

    def on_step(self, step: int) -> None:
        if step == self.step and os.environ.get("RANK", "0") == "0":
            assert wait_until(self.saved.is_dir, within_s=30, pause_s=0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def attempt(
    make: Callable[[Settings, str], Recipe], kind: str, settings: Settings, death: int
) -> dict[str, torch.Tensor]:
    made = make(settings, kind)
    updates = [*made.callbacks, Death(death, Path(settings.run_dir))]
    outcome = run(replace(made, callbacks=updates), settings)
    return {name: local(t).detach().clone() for name, t in outcome.model.named_parameters()}


def require_equal_to_whole(
    make: Callable[[Settings, str], Recipe],
    kind: str,
    world_size: int,
    folder: Path,
    **changed: Any,
) -> None:
    """Kills a run, goes on with it, and compares its weights with those of one that was never killed."""
    cut = replace(SETTINGS, run_dir=str(folder / "cut"), **changed)
    whole = replace(cut, run_dir=str(folder / "whole"))
    expected = run_ranks(attempt, world_size, make, kind, whole, -1, group=False)
    with start_ranks(
        attempt, world_size, make, kind, cut, DEATH, group=False, deadline_s=60
    ) as ranks:
        assert -signal.SIGKILL in [report.exit_code for report in ranks.wait()]
    assert steps(LocalDisk(folder / "cut" / "checkpoints")) == [4]
    found = run_ranks(attempt, world_size, make, kind, cut, -1, group=False)
    for own, other in zip(found, expected, strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_extra_state_of_modules_comes_back(world_size: int, tmp_path: Path) -> None:
    require_equal_to_whole(with_extra_state, "", world_size, tmp_path)


def test_extra_state_that_the_forward_pass_changes_comes_back_and_must_not_differ(
    tmp_path: Path,
) -> None:
    """It is the module's own, passed from micro-batch to micro-batch: ranks see other samples."""
    require_equal_to_whole(with_history, "", 1, tmp_path, micro_batch=12)
    apart = replace(SETTINGS, run_dir=str(tmp_path / "apart"))
    with pytest.raises(RanksError, match="get_extra_state of first differs between the ranks"):
        run_ranks(attempt, 2, with_history, "", apart, -1, group=False)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_an_optimizer_keeps_comes_back_wherever_it_is(
    kind: str, world_size: int, tmp_path: Path
) -> None:
    require_equal_to_whole(with_optimizer, kind, world_size, tmp_path)


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
def test_numbers_as_attributes_come_back_where_the_state_is_split(
    strategy: str, tmp_path: Path
) -> None:
    require_equal_to_whole(with_optimizer, "numbered", 2, tmp_path, strategy=strategy)


def test_what_an_optimizer_says_itself_goes_on_with_new_hyperparameters(tmp_path: Path) -> None:
    made: list[Optimizer] = []

    def rated(settings: Settings) -> Recipe:
        def optimizer(model: nn.Module) -> Optimizer:
            made.append(Lookahead(SGD(model.parameters(), lr=settings.lr, momentum=0.9)))
            return made[-1]

        return recipe(settings, optimizer=optimizer)

    settings = replace(SETTINGS, epochs=2, max_steps=4, run_dir=str(tmp_path))
    live(rated, settings)
    live(rated, replace(settings, max_steps=5, lr=0.5, change=("lr",)))
    (group,) = made[-1].param_groups
    assert (group["lr"], group["lookahead_step"]) == (0.5, 5)
    assert all("momentum_buffer" in made[-1]._inner.state[p] for p in group["params"])


# Refused


class Keyed(SGD):
    """Keeps state where `where` says, from its step on."""

    where = ""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr)
        self.generator = torch.Generator()
        self.window: deque[float] = deque(maxlen=3)
        self.slow: dict[Any, torch.Tensor] = {}

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        if self.where == "tuple":
            self.state["a", 1]["k"] = 1  # type: ignore[index]
        elif self.where == "generator":
            torch.rand(1, generator=self.generator)
        elif self.where == "deque":
            self.window.append(1.0)
        elif self.where == "by parameter":
            self.slow = {parameter: parameter.detach().clone() for parameter in parameters}
        super().step(closure)


class ById(SGD):
    def state_dict(self) -> dict[str, Any]:
        return {"slow": {id(p): torch.ones(2) for p in self.param_groups[0]["params"]}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Forgetful(SGD):
    """Its state_dict leaves the momentum out."""

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.param_groups[0]["lr"] = state["lr"]


def keyed(where: str) -> Callable[[Any], Optimizer]:
    return lambda parameters: type("Keyed", (Keyed,), {"where": where})(parameters, 0.1)


class NoState:
    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer

    def step(self) -> None:
        pass


class Pickled(Scaled):
    def get_extra_state(self) -> Any:
        return io.BytesIO(b"...")


class OneWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs)

    def get_extra_state(self) -> Any:
        return 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "under a tuple": (
        {"optimizer": lambda m: keyed("tuple")(m.parameters())},
        r"Keyed keeps state under \('a', 1\), a tuple",
    ),
    "a generator": (
        {"optimizer": lambda m: keyed("generator")(m.parameters())},
        r"optimizer/rest\.generator is a Generator",
    ),
    "a deque": (
        {"optimizer": lambda m: keyed("deque")(m.parameters())},
        r"optimizer/rest\.window is a deque",
    ),
    "by parameter": (
        {"optimizer": lambda m: keyed("by parameter")(m.parameters())},
        r"optimizer/rest\.slow is a dict",
    ),
    "by id": ({"optimizer": lambda m: ById(m.parameters(), lr=0.1)}, r"ById names .* by their id"),
    "left out": (
        {"optimizer": lambda m: Forgetful(m.parameters(), lr=0.1, momentum=0.9)},
        r"Forgetful leaves out the state of 0\.weight",
    ),
    "a scheduler": (
        {"scheduler": lambda optimizer, total_steps: NoState(optimizer)},
        r"the scheduler \(NoState\) has no state_dict and load_state_dict",
    ),
    "a pickle": ({"model": lambda: Model(Pickled)}, r"extra/first is a BytesIO"),
    "one way": ({"model": OneWay}, r"the model \(OneWay\) has get_extra_state and no set"),
}


class Counts(Updates):
    def __init__(self) -> None:
        self.done = 0

    def on_step(self, step: int) -> None:
        self.done = step


def refused_after_one_step(what: str, folder: Path) -> None:
    parts, words = REFUSED[what]
    settings = replace(SETTINGS, run_dir=str(folder))
    counts = Counts()
    with pytest.raises(ConfigError, match=words):
        run(replace(recipe(settings, **parts), callbacks=[counts]), settings)
    assert counts.done <= 1
    assert not list((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_checkpoint_can_hold_is_refused_after_the_first_step_by_name(
    what: str, tmp_path: Path
) -> None:
    refused_after_one_step(what, tmp_path)


@pytest.mark.parametrize("what", ["a generator", "a pickle"])
def test_it_is_refused_on_two_ranks_too(what: str, tmp_path: Path) -> None:
    run_ranks(refused_after_one_step, 2, what, tmp_path, group=False)


def differs(what: str, folder: Path) -> None:
    """What is kept depends on the rank."""
    rank = int(os.environ["RANK"])
    settings = replace(SETTINGS, run_dir=str(folder))

    class Own(Numbered):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            self.k = rank

    class OwnScaled(Scaled):
        def get_extra_state(self) -> Any:
            return {"rank": rank, **super().get_extra_state()}

    made = recipe(settings, optimizer=lambda m: Own(m.parameters(), 0.1))
    if what == "first":
        made = recipe(settings, model=lambda: Model(OwnScaled))
    with pytest.raises(ConfigError, match=rf"{what}.* differs between the ranks"):
        run(made, settings)


@pytest.mark.parametrize("what", ["first", "what Own keeps"])
def test_what_differs_between_ranks_is_refused_by_name(what: str, tmp_path: Path) -> None:
    run_ranks(differs, 2, what, tmp_path, group=False)


def refused_where_split(kind: str, strategy: Any, folder: Path) -> None:
    settings = replace(SETTINGS, run_dir=str(folder), strategy=strategy)
    with pytest.raises(ConfigError, match=r"--strategy"):
        run(with_optimizer(settings, kind), settings)
    assert not list((folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("strategy", ["zero1", "fsdp"])
@pytest.mark.parametrize("kind", ["named", "based", "stateful"])
def test_what_is_not_the_same_on_all_ranks_is_refused_where_the_state_is_split(
    kind: str, strategy: str, tmp_path: Path
) -> None:
    run_ranks(refused_where_split, 2, kind, strategy, tmp_path, group=False)


def moved(folder: Path) -> None:
    settings = replace(SETTINGS, run_dir=str(folder))
    first = replace(settings, epochs=1, max_steps=4)
    run(with_optimizer(first, "stateful"), first)
    with pytest.raises(ConfigError, match=r"cannot go on with this --strategy: Stateful"):
        run(with_optimizer(first, "stateful"), replace(first, max_steps=6, strategy="fsdp"))


def test_a_rest_does_not_move_to_a_strategy_that_splits(tmp_path: Path) -> None:
    run_ranks(moved, 2, tmp_path, group=False)


def test_the_best_checkpoint_is_tested_with_the_extra_state_it_had(tmp_path: Path) -> None:
    """And training has its own again: the test data are not the last that sees the model."""
    seen: list[int] = []

    class Watched(Scaled):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if not self.training:
                seen.append(len(self.calls))
            return super().forward(inputs)

    def lossy(model: nn.Module, batch: Any) -> LossSum:
        """Is lowest at step 2."""
        inputs, labels = batch
        total = cross_entropy(model(inputs), labels, reduction="sum")
        if not model.training:
            total = total * 0 + abs(len(model.first.calls) - 2)
        return LossSum(total, len(labels))

    settings = replace(SETTINGS, max_steps=6, eval_every=2, run_dir=str(tmp_path))
    made = recipe(
        settings,
        model=lambda: Model(Watched),
        loss=lossy,
        eval_data=lambda: vectors(24),
        test_data=lambda: vectors(24),
        callbacks=[Updates()],
    )
    outcome = run(made, settings)
    assert seen[-1] == 2
    assert len(outcome.model.first.calls) == 6


class Companions(SGD):
    """Holds tools and the model, none of which is state of its own."""

    def __init__(self, model: nn.Module):
        super().__init__((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
        self.model, self.log, self.math = model, logging.getLogger("own"), torch
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.views = {"groups": self.param_groups, "first": self.param_groups[0]}
        self.hook = lambda: self.log

    def step(self, closure: Any = None) -> None:
        self.log.debug("a step over %d", len(self.params))
        super().step(closure)


def test_tools_and_the_model_itself_are_no_state_of_an_optimizer(tmp_path: Path) -> None:
    """The logger has a cache, the model buffers and frozen weights, the groups a rate that moves."""

    def model() -> nn.Module:
        made = normed()
        made[0].requires_grad_(False)
        return made

    settings = replace(SETTINGS, run_dir=str(tmp_path))
    parts: dict[str, Any] = {
        "optimizer": Companions,
        "scheduler": lambda optimizer, steps: schedules.warmup_cosine(optimizer, steps),
    }
    assert run(recipe(settings, model=model, **parts), settings).step == 9
    state = json.loads((tmp_path / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert [entry["rest"] for entry in state["objectives"]] == [{}]
