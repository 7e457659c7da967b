"""channels_last, which convolutional models are given by default, changes nothing that they compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, distance, recipe, trace
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import TensorDataset

import ddp_kit
from ddp_kit import Data, Recipe
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.setup.build import build
from ddp_kit.testing import run_ranks

STEPS = 3


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(96, 4, 6, 6, generator=generator)
    return TensorDataset(inputs, inputs.mean((2, 3)).argmax(1))


class Net(nn.Module):
    """A convolution and a head; what stands between them is each habit's own."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(features, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(torch.tanh(self.conv(x))))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


class Video(Net):
    """A three-dimensional convolution beside the other."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv3d(1, 2, 3, padding=1)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + self.deep(x[:, None]).mean((1, 3, 4))


class Fourier(Net):
    """Takes channels in pairs as complex numbers."""

    def __init__(self) -> None:
        super().__init__(36)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.view(len(x), 8, 18, 2))
        return torch.view_as_real(pairs.mean(1)).flatten(1)


class Complex(Net):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_complex(x.unflatten(3, (3, 2))).real.mean((2, 3))


class Patches(Net):
    """Cuts windows out of the memory of what a convolution gives."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.as_strided((len(x), 8, 4), (288, 36, 7))
        return windows.square().sum(2)


class Positions(Net):
    """A four-dimensional weight that is no convolution's, read as a table."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1, 8, 6, 6))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) + self.bias.view(8, 36).as_strided((8,), (36,))


class _Odd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        # As a kernel of one's own does that knows one format.
        flat = x.as_strided((x.numel(),), (1,))
        return gradient * flat.cos().reshape(x.shape)


class OddBackward(Net):
    """Its gradients are others in another format, and its loss is not."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return _Odd.apply(x).square().mean((2, 3))  # type: ignore[no-untyped-call]


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm1d(8)])
        self.pool = nn.ConvTranspose2d(8, 8, 3, stride=2)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.norms
        return second(self.pool(first(x)).mean((2, 3)))


class Grouped(Net):
    """A module of torch's own that reshapes inside, and a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.shuffle = nn.ChannelShuffle(2)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return (self.shuffle(self.norm(x)) * self.scale).flatten(2).mean(2)


class Dropping(Net):
    """Dropout of single units, and noise: drawn in the order of memory."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x, 0.5, self.training)
        if self.training:
            x = x + 0.5 * torch.randn_like(x) + torch.empty_like(x).uniform_()
        return x.square().mean((2, 3))


# Whether channels_last may stay.
HABITS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (Net, True),
    "video": (Video, True),
    "fourier": (Fourier, False),
    "complex": (Complex, False),
    "patches": (Patches, False),
    "positions": (Positions, True),
    "odd backward": (OddBackward, False),
    "normed": (Normed, True),
    "grouped": (Grouped, True),
}


def made(settings: Settings, model: Callable[[], nn.Module], **parts: Any) -> Recipe:
    return recipe(settings, model=model, **({"train_data": lambda: Data(images())} | parts))


def bare(
    model: Callable[[], nn.Module], settings: Settings, *, optimizer: Any = None
) -> tuple[list[float], nn.Module]:
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = model()
    stepped = SGD(net.parameters(), lr=settings.lr, momentum=settings.momentum)
    if optimizer is not None:
        stepped = optimizer(net)
    inputs, labels = images().tensors
    losses = []
    for step in range(STEPS):
        part = torch.from_numpy(permutation(0, 0, 96)[24 * step : 24 * step + 24])
        stepped.zero_grad()
        loss = cross_entropy(net(inputs[part]), labels[part])
        loss.backward()
        stepped.step()
        losses.append(loss.item())
    return losses, net


def is_laid(found: Any) -> bool:
    weight = found.training.model.conv.weight
    is_last = weight.is_contiguous(memory_format=torch.channels_last)
    assert is_last == found.feed.placement.channels_last == found.evaluator.placement.channels_last
    return bool(is_last)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("name", HABITS)
def test_what_a_model_computes_is_what_bare_torch_computes(group: Group, name: str) -> None:
    model, may_stay = HABITS[name]
    settings = Settings(max_steps=STEPS, precision="fp32")
    if name in ("normed", "odd backward") and group.world_size > 1:
        # Over a micro-batch: as one rank has it, that is no reference for two.
        assert is_laid(build(made(settings, model), settings, group)) is may_stay
        return
    losses, net = bare(model, settings)
    ours = trace(group, made(settings, model), settings)
    assert ours.losses == pytest.approx(losses, abs=1e-5)
    assert distance(ours.state, dict(net.state_dict())) <= 1e-5
    assert is_laid(build(made(settings, model), settings, group)) is may_stay


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_other_draws_and_rounding_are_no_difference(group: Group, precision: Any) -> None:
    settings = Settings(precision=precision)
    for model in (Dropping, Normed):
        assert is_laid(build(made(settings, model), settings, group))


@pytest.mark.ranks(1, 2)
def test_only_the_weights_of_convolutions_are_laid_otherwise(group: Group) -> None:
    settings = Settings(precision="fp32")
    model: Any = build(made(settings, Positions), settings, group).training.model
    assert not model.conv.weight.is_contiguous()
    assert model.bias.is_contiguous()


def flat_evaluation(model: nn.Module, batch: Any) -> Any:
    inputs, _ = batch
    return {"mean": (model.conv(inputs).view(-1).sum(), len(inputs))}


def strided_evaluation(model: nn.Module, batch: Any) -> Any:
    inputs, _ = batch
    found = torch.tanh(model.conv(inputs))
    return {"first": (found.as_strided((len(inputs), 36), (288, 1)).sum(), len(inputs))}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("evaluate", [flat_evaluation, strided_evaluation])
def test_evaluation_reads_memory_too(group: Group, evaluate: Any) -> None:
    settings = Settings(precision="fp32")
    parts = {"evaluate": evaluate, "eval_data": lambda: Data(images())}
    found = build(made(settings, Net, **parts), settings, group)
    assert not is_laid(found)
    ours = found.evaluator(found.training.model)
    model = found.training.model
    inputs = images().tensors[0]
    with torch.no_grad():
        (name, (total, count)) = next(iter(evaluate(model, (inputs, None)).items()))
    assert ours[name] == pytest.approx(float(total) / count, rel=1e-4)


class Matrices(SGD):
    """Takes a convolution's weight as a matrix, as Muon and Shampoo do."""

    flatten: Any = staticmethod(torch.Tensor.view)

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter.dim() == 4:
                rows = self.flatten(parameter.grad, (len(parameter), -1))
                rows /= 0.1 + rows[:, :9].norm(dim=1, keepdim=True)
                parameter.grad = rows.reshape(parameter.shape)
        super().step()


class Strided(Matrices):
    """The same by strides, which raise nothing."""

    @staticmethod
    def flatten(gradient: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        return gradient.as_strided(
            (shape[0], gradient[0].numel()), (gradient[0].numel(), 1)
        ).clone()


class Reshaped(Matrices):
    flatten = staticmethod(torch.Tensor.reshape)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    ("kind", "may_stay"), [(Matrices, False), (Strided, False), (Reshaped, True)]
)
def test_optimizers_read_memory_too(group: Group, kind: Any, may_stay: bool) -> None:
    settings = Settings(max_steps=STEPS, precision="fp32")

    def optimizer(model: nn.Module) -> SGD:
        made: SGD = kind(model.parameters(), lr=0.1, momentum=0.9)
        return made

    _, net = bare(Net, settings, optimizer=optimizer)
    ours = trace(group, made(settings, Net, optimizer=optimizer), settings)
    assert distance(ours.state, dict(net.state_dict())) <= 1e-5
    assert is_laid(build(made(settings, Net, optimizer=optimizer), settings, group)) is may_stay


class OneRanks(Net):
    """Reads memory on one rank alone."""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if torch.distributed.get_rank() == 1:
            return x.view(len(x), -1)[:, ::36]
        return super().between(x)


@pytest.mark.ranks(2)
def test_all_ranks_take_one_format(group: Group) -> None:
    settings = Settings(precision="fp32")
    assert not is_laid(build(made(settings, OneRanks), settings, group))


@pytest.mark.ranks(1, 2)
def test_a_loss_that_fails_anyway_is_told_as_it_fails(group: Group) -> None:
    settings = Settings(precision="fp32")

    def failing(model: nn.Module, batch: Any) -> Any:
        raise ValueError("neither format helps")

    with pytest.raises(
        ValueError, match=r"^neither format helps\nin the forward pass before the first step[^\n]*$"
    ):
        build(made(settings, Net, loss=failing), settings, group)


class Later(Net):
    """Takes a branch from the second step on that wants one format, as losses do after a warm-up."""

    step = 0
    branch = ""

    def between(self, x: torch.Tensor) -> torch.Tensor:
        if Later.step and Later.branch == "assert":
            assert x.is_contiguous()
        if Later.step:
            return x.view(len(x), -1)[:, ::36]
        return super().between(x)


class Counts:
    def on_start(self, model: nn.Module) -> None:
        pass

    def on_step(self, step: int) -> None:
        Later.step = step

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def later(folder: Path, tuning: bool) -> list[str]:
    """Returns the notes of the error that each branch ends in, "finished" where there is none."""
    told = []
    for branch in ("view", "assert"):
        Later.step = 0
        Later.branch = branch
        settings = Settings(
            max_steps=STEPS, precision="fp32", run_dir=str(folder / branch), tuning=tuning
        )
        try:
            ended = ddp_kit.run(made(settings, Later, callbacks=[Counts()]), settings)
            told.append(ended.status)
        except Exception as error:
            told.append(" ".join(getattr(error, "__notes__", [])))
    return told


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_branch_that_comes_later_is_told_the_flag(tmp_path: Path, ranks: int) -> None:
    for told in run_ranks(later, ranks, tmp_path / "on", True, group=False):
        assert all("channels_last" in note and "--no-tuning" in note for note in told)
    for told in run_ranks(later, ranks, tmp_path / "off", False, group=False):
        assert told == ["finished", "finished"]
