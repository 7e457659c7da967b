"""Models with weights of other kinds: normed weights, shared layers and tables, integers, half precision."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, distance, plain, recipe, trace, vectors
from lives import live, lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import SGD

import ddp_kit
from ddp_kit import Data
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger
from ddp_kit.setup.build import build
from ddp_kit.testing import run_ranks


def normed_weights() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), weight_norm(nn.Linear(8, 4)))


class OldWeightNorm(nn.Module):
    """As it is written in code of years ago: the weight is made anew in a hook, and is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        weight = self.head.weight
        del self.head._parameters["weight"]
        self.head.register_parameter("weight_g", nn.Parameter(weight.norm(dim=1, keepdim=True)))
        self.head.register_parameter("weight_v", nn.Parameter(weight.detach().clone()))
        self.head.register_forward_pre_hook(self._set)
        self._set(self.head, ())

    @staticmethod
    def _set(module: Any, inputs: Any) -> None:
        v = module.weight_v
        module.weight = v * (module.weight_g / v.norm(dim=1, keepdim=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Siamese(nn.Module):
    """One encoder with BatchNorm that sees two views in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x) - self.encoder(0.5 * x + 1).flip(0))


class Quantised(nn.Module):
    """A frozen base in whole numbers, as parameters; a scale beside it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randint(-9, 9, (4, 6)), requires_grad=False)
        self.mask = nn.Parameter(torch.ones(4, 6, dtype=torch.bool), requires_grad=False)
        self.scale = nn.Parameter(torch.full((4, 1), 0.1))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.base * self.mask * self.scale).T + self.bias


class Tied(nn.Module):
    """One table for words in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.out = nn.Linear(6, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x.abs() * 5).long() % 12
        return self.out(self.table(words).mean(1))[:, :4]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": normed_weights,
    "old weight norm": OldWeightNorm,
    "siamese": Siamese,
    "quantised": Quantised,
    "tied": Tied,
}


def of(name: str, settings: Settings) -> Any:
    return recipe(
        settings,
        model=MODELS[name],
        optimizer=lambda m: SGD(
            [p for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        ),
        eval_data=lambda: Data(vectors(20)),
    )


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in state.items()}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", MODELS)
def test_one_micro_batch_is_bare_torch(group: Group, name: str) -> None:
    settings = Settings(max_steps=4, precision="fp32")
    ours = trace(group, of(name, settings), settings)
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = MODELS[name]()
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    inputs, labels = vectors().tensors
    for step in range(4):
        part = torch.from_numpy(permutation(0, 0, 240)[24 * step : 24 * step + 24])
        optimizer.zero_grad()
        cross_entropy(net(inputs[part]), labels[part]).backward()
        optimizer.step()
    bare = dict(net.state_dict())
    for state in (ours.state, bare):
        # That of the layer grows once a step, whatever the number of calls.
        state.pop("encoder.1.num_batches_tracked", None)
    assert distance(floats(ours.state), floats(bare)) <= 1e-6


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_give_what_one_gives(group: Group, name: str) -> None:
    settings = Settings(max_steps=4, micro_batch=4)
    ours = trace(group, of(name, settings), settings)
    with process_group(topology=Topology(), device="cpu") as alone:
        one = trace(alone, of(name, settings), settings)
    assert distance(floats(ours.state), floats(one.state)) <= 1e-12


@pytest.mark.parametrize("name", ["quantised", "tied", "siamese"])
def test_an_average_is_evaluated_and_saved_and_the_weights_stay_those_of_training(
    tmp_path: Path, name: str
) -> None:
    """Killed after a save and gone on with by another number of ranks."""
    make = partial(of, name)
    settings = Settings(
        max_steps=6, micro_batch=4, eval_every=2, save_every=2, precision="fp32", grad_clip=0.5
    )
    without = lives(make, settings, world_size=1)[0]
    settings = replace(settings, ema=0.5)
    whole = lives(make, settings, world_size=1)[0]
    assert distance(floats(whole.state), floats(without.state)) <= 1e-7
    assert whole.metrics["loss"] != pytest.approx(without.metrics["loss"], rel=1e-4)
    own = replace(settings, run_dir=str(tmp_path / "run"), max_steps=4)
    run_ranks(live, 2, make, own, group=False)
    on = replace(own, max_steps=6, change=("max_steps",))
    for resumed in run_ranks(live, 2, make, on, group=False):
        assert distance(floats(resumed.state), floats(whole.state)) <= 1e-6
        assert distance(floats(resumed.files), floats(whole.files)) <= 1e-6
        assert resumed.metrics == pytest.approx(whole.metrics, rel=1e-5)


class SharedMemory(nn.Module):
    """Two parameters of one memory, as `.data =` makes them: a tie that a move to a device cuts."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)
        self.other = nn.Linear(6, 6, bias=False)
        if what == "parameter":
            self.other.weight.data = self.one.weight.data
        else:
            self.register_buffer("alias", self.one.weight.data)


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parameter", r"one\.weight and other\.weight share memory without being one parameter"),
        ("buffer", r"one\.weight and alias share memory without being one parameter"),
    ],
)
def test_tensors_of_one_memory_that_are_not_one_are_refused(
    group: Group, what: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(recipe(Settings(), model=lambda: SharedMemory(what)), Settings(), group)


@pytest.mark.ranks(1)
def test_views_that_lie_side_by_side_are_taken(group: Group) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            memory = torch.randn(48)
            self.one = nn.Parameter(memory[:24].view(4, 6))
            self.other = nn.Parameter(memory[24:].view(4, 6))
            table = torch.randn(2, 4)
            self.register_buffer("cos", table[0])
            self.register_buffer("sin", table[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.one + self.other).T * self.cos + self.sin

    build(recipe(Settings(), model=Views), Settings(), group)


class HalfInHalf(nn.Module):
    """Some weights in half precision, which the forward pass minds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(6, 16).bfloat16()
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.large(x.to(self.large.weight.dtype))
        return self.head(hidden.tanh().to(self.head.weight.dtype))


def own_loop(folder: str, end: int) -> tuple[dict[str, torch.Tensor], list[torch.dtype]]:
    """As one who trains with weights in half precision writes it."""
    with ddp_kit.process_group(device="cpu") as group:
        torch.manual_seed(0)
        model = HalfInHalf()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        feed = ddp_kit.build_loader(Data(vectors()), group=group, global_batch=24, micro_batch=12)
        training = ddp_kit.wrap(model, optimizer, classify, group=group, feed=feed, grad_clip=0.5)
        ddp_kit.restore(training, folder)
        for batch in feed.batches(start=training.step, end=end):
            ddp_kit.train_step(training, batch)
        ddp_kit.save(training, folder)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = [entry["exp_avg"].dtype for entry in optimizer.state.values()]
        return state, kept


def test_weights_in_half_precision_train_as_in_bare_torch_and_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    whole, kept = run_ranks(own_loop, 1, str(tmp_path / "whole"), 6, group=False)[0]
    assert set(kept) == {torch.bfloat16, torch.float32}
    run_ranks(own_loop, 1, str(tmp_path / "cut"), 3, group=False)
    resumed, _ = run_ranks(own_loop, 1, str(tmp_path / "cut"), 6, group=False)[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    two, _ = run_ranks(own_loop, 2, str(tmp_path / "two"), 6, group=False)[0]
    assert distance(floats(two), floats(whole)) <= 2e-2

    torch.manual_seed(0)
    net = HalfInHalf()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    inputs, labels = vectors().tensors
    for step in range(6):
        optimizer.zero_grad()
        for half in range(2):
            begin = 24 * step + 12 * half
            part = torch.from_numpy(permutation(0, 0, 240)[begin : begin + 12])
            (cross_entropy(net(inputs[part]), labels[part], reduction="sum") / 24).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    bare = dict(net.state_dict())
    assert distance(floats(whole), floats(bare)) <= 1e-2
    assert {name: tensor.dtype for name, tensor in whole.items()} == {
        name: tensor.dtype for name, tensor in bare.items()
    }


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("grid", torch.linspace(0, 1, 6, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.grid)


@pytest.mark.ranks(1, 2)
def test_a_run_trains_them_in_full_precision_and_says_so(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(max_steps=3, precision="fp32")
    said: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *args: said.append(text % args))
    for model, expected in (
        (HalfInHalf, "large.weight, large.bias has bfloat16: it is cast to float32; --precision b"),
        (Doubles, "grid has float64: it is cast to float32; --precision fp64"),
        (plain, ""),
    ):
        said.clear()
        ours = trace(group, recipe(settings, model=model), settings)
        assert {tensor.dtype for tensor in ours.state.values()} == {torch.float32}
        notes = [text for text in said if "is cast to" in text]
        assert len(notes) == bool(expected and not group.rank)
        assert all(expected in text for text in notes)
