"""Buffers that grow, that state dicts leave out, or of kinds that few people have: trained, saved, gone on from."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, distance, recipe, vectors
from lives import Life, live
from torch import nn

from ddp_kit import Data
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.testing import run_ranks


def sized(model: nn.Module, batch: Any) -> Any:
    """The length of what the model sees grows from batch to batch, as sentences' does."""
    inputs, labels = batch
    length = 1 + int(inputs[:, 0].abs().max() * 4)
    return classify(lambda x: model(x, length), (inputs, labels))


class Rotary(nn.Module):
    """A table beside its length, made anew where it is too short."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.length = 0
        self._fill(2)

    def _fill(self, length: int) -> None:
        self.length = length
        table = torch.arange(length).cos() / 10
        self.register_buffer("table", table.double(), persistent=False)

    def forward(self, x: torch.Tensor, length: int) -> torch.Tensor:
        if length > self.length:
            self._fill(length)
        return self.head(x) + self.table[:length].sum() / length


class LazyMask(nn.Module):
    """A mask that is registered in the first pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, length: int) -> torch.Tensor:
        if not hasattr(self, "mask") or len(self.mask) < length:
            self.register_buffer("mask", torch.ones(length, dtype=torch.bool), persistent=False)
        return self.head(x) * self.mask[:length].sum() / length


class Memory(nn.Module):
    """A bank that grows, and is persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("bank", torch.zeros(0, 6))

    def forward(self, x: torch.Tensor, length: int) -> torch.Tensor:
        if self.training:
            self.bank = torch.cat([self.bank, x[:1].detach()])[-5:]
        return self.head(x + self.bank.sum(0) / 10)


class Late(Rotary):
    """The table grows in the middle of the run for the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._fill(13)


def growing(model: Callable[[], nn.Module]) -> Callable[[Settings], Any]:
    return lambda settings: recipe(
        settings, model=model, loss=sized, eval_data=lambda: Data(vectors(10))
    )


def live_with(settings: Settings, name: str) -> Life:
    return live(growing(MODELS[name]), settings)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "rotary": Rotary,
    "mask": LazyMask,
    "memory": Memory,
    "late": Late,
}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_whose_buffers_grow_goes_on_from_its_checkpoints(
    tmp_path: Path, name: str, world_size: int
) -> None:
    settings = Settings(max_steps=8, micro_batch=4, save_every=4, eval_every=4, ema=0.5)

    def run(folder: str, steps: int, ranks: int) -> Life:
        own = replace(
            settings, run_dir=str(tmp_path / folder), max_steps=steps, change=("max_steps",)
        )
        return run_ranks(live_with, ranks, own, name, group=False)[0]

    whole = run("whole", 8, world_size)
    run("cut", 4, 3 - world_size)
    resumed = run("cut", 8, world_size)
    assert resumed.step == 8
    assert distance(resumed.state, whole.state) <= 1e-12
    assert resumed.files.keys() == whole.files.keys()
    files = ({key: file.double() for key, file in life.files.items()} for life in (resumed, whole))
    assert distance(*files) <= 1e-12
    assert resumed.metrics == pytest.approx(whole.metrics, abs=1e-12)


class Table(nn.Module):
    """A table that the model makes when it is built, and state dicts leave out."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("table", torch.arange(length).cos(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x) + self.table[:2].sum()


def live_with_table(settings: Settings, length: int) -> Life:
    return live(lambda own: recipe(own, model=lambda: Table(length)), settings)


def test_a_table_that_is_made_longer_need_not_fit_its_checkpoint(tmp_path: Path) -> None:
    settings = Settings(save_every=4, ema=0.5, change=("max_steps",))

    def run(folder: str, steps: int, length: int) -> Life:
        own = replace(settings, run_dir=str(tmp_path / folder), max_steps=steps)
        return run_ranks(live_with_table, 1, own, length, group=False)[0]

    whole = run("whole", 8, 4)
    run("cut", 4, 4)
    resumed = run("cut", 8, 6)
    assert resumed.step == 8
    assert distance(resumed.state, whole.state) == 0


class Odd(nn.Module):
    """Kinds of buffers that gloo does not know, and memory that is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("short", torch.zeros(3, dtype=torch.int16))
        self.register_buffer("unsigned", torch.zeros(3, dtype=torch.uint16))
        self.register_buffer("long", torch.zeros((), dtype=torch.uint32), persistent=False)
        self.register_buffer("wide", torch.zeros(1).expand(5))
        self.register_buffer("eighth", torch.zeros(3).to(torch.float8_e4m3fn))
        self.register_buffer("sixteen", torch.zeros(3, dtype=torch.float16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.short += 1
            self.unsigned = (self.unsigned.int() + 2).to(torch.uint16)
            self.wide = self.wide + 1
        return self.head(x) + self.wide.sum()


def live_oddly(settings: Settings) -> dict[str, list[Any]]:
    """Returns lists: torch sends no tensor of these kinds to another process."""
    life = live(lambda own: recipe(own, model=Odd), settings)
    return {name: life.state[name].tolist() for name in ("short", "unsigned", "wide")}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_buffers_of_any_kind_are_trained_saved_and_gone_on_from(
    tmp_path: Path, world_size: int, precision: Any
) -> None:
    settings = Settings(
        max_steps=4,
        micro_batch=4,
        save_every=2,
        run_dir=str(tmp_path),
        change=("max_steps",),
        precision=precision,
    )
    for steps in (2, 4):
        own = replace(settings, max_steps=steps)
        for found in run_ranks(live_oddly, world_size, own, group=False):
            assert found["short"] == [steps] * 3
            assert found["unsigned"] == [2 * steps] * 3
            assert found["wide"] == [float(steps)] * 5


def test_the_hash_of_weights_with_a_table_that_state_dicts_leave_out_is_what_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1)
        model.bias.fill_(2)
    model.register_buffer("table", torch.ones(3), persistent=False)
    assert weights_sha256(model)[:12] == "5fd8ea0fd131"
