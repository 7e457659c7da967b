"""torch's fused kernels, which are switched on by default, step what its other kernels would."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, distance, plain, recipe, trace, vectors
from lives import live
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import TensorDataset

from ddp_kit import Data, Recipe
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import build
from ddp_kit.strategies.fused_step import fuse
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step

STEPS = 7
LATE = {3, 4, 6}  # the first gradient at step 3, and then none at times
FADING = {0, 1, 4}  # vanishes, and comes again
KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, dampening=0.5),
    "maximised": lambda parameters: SGD(parameters, lr=0.01, momentum=0.9, maximize=True),
    "adam": lambda parameters: Adam(parameters, lr=0.02, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.02),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.02),
}


class Experts(nn.Module):
    """A mixture whose experts are chosen by the samples: a step may bring none to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 4)
        self.late = nn.Linear(6, 4)
        self.fading = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[:, 0].round()
        out = self.shared(x)
        for number, expert in ((1, self.late), (2, self.fading)):
            at = (chosen == number).nonzero()[:, 0]
            if len(at):
                out = out.index_add(0, at, expert(x[at]))
        return out


def routed() -> TensorDataset:
    """In their order, samples that only a rank's share of a step routes to an expert."""
    inputs, labels = vectors().tensors
    inputs[:, 0] = 0
    for step in range(STEPS):
        inputs[24 * step, 0] = 1 if step in LATE else 0
        inputs[24 * step + 13, 0] = 2 if step in FADING else 0
    return TensorDataset(inputs, labels)


def in_order(seed: int, epoch: int, size: int) -> Any:
    return np.arange(size)


def mixture(settings: Settings, *, kind: str = "momentum", **parts: Any) -> Recipe:
    return recipe(
        settings,
        model=Experts,
        optimizer=lambda model: KINDS[kind](model.parameters()),
        train_data=lambda: Data(routed(), order=in_order),
        **parts,
    )


def made_by(kind: str, model: nn.Module) -> Optimizer:
    make = hooked if kind == "hooked" else KINDS[kind]
    return make(model.parameters())


def bare(
    model: Callable[[], nn.Module],
    kind: str,
    data: TensorDataset,
    order: Any,
    *,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """The same in plain torch, with its own choice of a kernel."""
    torch.manual_seed(key(0, Purpose.WEIGHTS))
    net = model().to(dtype)
    optimizer = made_by(kind, net)
    inputs, labels = data.tensors
    for step in range(STEPS):
        part = torch.from_numpy(np.asarray(order[24 * step : 24 * step + 24]))
        optimizer.zero_grad()
        cross_entropy(net(inputs[part].to(dtype)), labels[part]).backward()
        optimizer.step()
    return net


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", KINDS)
def test_first_gradients_may_come_late_and_vanish_again(group: Group, kind: str) -> None:
    net = bare(Experts, kind, routed(), np.arange(240))
    for strategy in ("ddp", "zero1"):
        if kind == "adagrad" and strategy == "zero1" and group.world_size > 1:
            # It has state before the first step, which zero1 refuses.
            continue
        settings = Settings(max_steps=STEPS, find_unused_parameters=True, strategy=strategy)
        ours = trace(group, mixture(settings, kind=kind), settings)
        assert distance(ours.state, dict(net.state_dict())) <= 1e-12


def momentum_of(run_dir: Path, step: int) -> list[str]:
    from safetensors.torch import load_file

    names: list[str] = []
    for path in (run_dir / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"):
        names += [name for name in load_file(path) if "momentum" in name]
    return sorted(names)


def interrupted(folder: Path) -> list[tuple[float, ...]]:
    """Runs through, and goes on from before and after the late expert's first gradient."""
    settings = Settings(
        max_steps=STEPS,
        find_unused_parameters=True,
        save_every=1,
        keep=STEPS,
        run_dir=str(folder / "whole"),
    )
    whole = live(mixture, settings)
    found = [tuple(torch.cat([value.flatten() for value in whole.state.values()]).tolist())]
    for step in (2, 4):
        own = replace(settings, run_dir=str(folder / f"from-{step}"))
        life = live(
            mixture, replace(own, resume=str(folder / f"whole/checkpoints/step-{step:08d}"))
        )
        found.append(tuple(torch.cat([value.flatten() for value in life.state.values()]).tolist()))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_momentum_that_begins_late_resumes(tmp_path: Path, ranks: int) -> None:
    for whole, before, after in run_ranks(interrupted, ranks, tmp_path, group=False):
        assert before == whole
        assert after == whole
    # As in bare torch: what has had no gradient has no momentum.
    assert not any("late" in name for name in momentum_of(tmp_path / "whole", 2))
    assert sum("late" in name for name in momentum_of(tmp_path / "whole", 4)) == 2


class Strided(nn.Module):
    """A weight that is every second column of a table, and one that lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter((torch.randn(16, 12) / 3)[:, ::2])
        self.second = nn.Parameter(torch.randn(16, 4).t() / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.first.t()) @ self.second.t()


def turned(gradient: torch.Tensor) -> torch.Tensor:
    """Returns the same values in memory of another order."""
    return gradient.t().contiguous().t()


def with_hooks() -> nn.Module:
    """Gives its weights gradients of its own making, as projections and ports of others do."""
    net = plain()

    def replace_gradient(parameter: torch.Tensor) -> None:
        if parameter.dim() == 2 and parameter.grad is not None:
            parameter.grad = turned(parameter.grad)

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(replace_gradient)
    return net


def hooked(parameters: Any) -> Optimizer:
    """An optimizer that is given another gradient before each of its steps."""
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)

    def projected(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.dim() == 2:
                parameter.grad = turned(parameter.grad * 0.5)

    optimizer.register_step_pre_hook(projected)
    return optimizer


LAID = {
    "strided momentum": (Strided, "momentum"),
    "strided adamw": (Strided, "adamw"),
    "gradients replaced, momentum": (with_hooks, "momentum"),
    "gradients replaced, adam": (with_hooks, "adam"),
    "gradients replaced before the step": (plain, "hooked"),
}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", LAID)
def test_gradients_and_weights_may_lie_in_memory_as_they_like(group: Group, name: str) -> None:
    model, kind = LAID[name]
    net = bare(model, kind, vectors(), permutation(0, 0, 240), dtype=torch.float32)
    for strategy in ("ddp", "zero1"):
        # A hook of the weights sees the sum at one rank only.
        if model is with_hooks and group.world_size > 1:
            continue
        if model is Strided and strategy == "zero1":
            continue
        # In float64 a model is cast, and its weights lie as usual.
        settings = Settings(max_steps=STEPS, strategy=strategy, precision="fp32")
        made = recipe(settings, model=model, optimizer=lambda found: made_by(kind, found))
        ours = trace(group, made, settings)
        assert distance(ours.state, dict(net.state_dict())) <= 1e-6


@pytest.mark.ranks(1, 2)
def test_weights_with_others_memory_between_them_cannot_be_sent(group: Group) -> None:
    settings = Settings(strategy="zero1", precision="fp32")
    with pytest.raises(ConfigError, match=r"^--strategy zero1 .* first is a view .*contiguous\(\)"):
        build(recipe(settings, model=Strided), settings, group)


# DDP's own, which keeps the gradients as the weights lay at first.
@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_weights_may_be_laid_otherwise_in_the_midst_of_a_run(group: Group, kind: str) -> None:
    net = bare(plain, kind, vectors(), permutation(0, 0, 240))
    settings = Settings(max_steps=STEPS)
    made = recipe(settings, optimizer=lambda model: KINDS[kind](model.parameters()))
    found = build(made, settings, group)
    model = found.training.model
    for step, batch in enumerate(found.feed.batches(start=0, end=STEPS)):
        if step == 3:
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.data = turned(parameter.data)
        train_step(found.training, batch)
    found.training.control_packet.close()
    assert distance(dict(model.state_dict()), dict(net.state_dict())) <= 1e-12


def test_the_kernels_are_fused_where_they_can_be() -> None:
    assert fuse(KINDS["momentum"](plain().parameters()))
    assert fuse(
        KINDS["adamw"](nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).parameters())
    )
    assert not fuse(KINDS["dampening"](plain().parameters()))
    assert not fuse(KINDS["momentum"](Strided().parameters()))
