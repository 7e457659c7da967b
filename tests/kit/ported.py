"""The ported programs of recipes/ported/, and what the bare loops that they are held against need: the first weights and the batches."""

import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
import torch
from paths import RECIPES
from torch import nn
from torch.utils.data import default_collate

from ddp_kit import Data, Draws
from ddp_kit.data.dataset import as_data
from ddp_kit.data.seeding import (
    Purpose,
    forward_key,
    key,
    occurrences_in,
    permutation,
    seed_forward,
)
from ddp_kit.data.transfer import map_tensors
from ddp_kit.distributed.collectives import sum_by_name
from ddp_kit.distributed.process_group import Group
from ddp_kit.metrics import tensor_of
from ddp_kit.recipe import load_recipe
from ddp_kit.setup.build import build
from ddp_kit.training.step import train_step

Curves = dict[str, list[float]]
CPU = torch.device("cpu")


class Program:
    """A ported program with settings, in float64 unless they say otherwise."""

    def __init__(self, name: str, **changes: Any):
        source = load_recipe(str(RECIPES / "ported" / f"{name}.py"))
        given = {"precision": "fp64", "device": "cpu", "max_steps": 12} | changes
        self.settings = source.settings(**given)
        self.recipe = source.build(self.settings)
        self.module: ModuleType = sys.modules[source.build.__module__]

    def curves(self, group: Group) -> Curves:
        """Returns the losses and metrics of each step as ddp_kit trains it on this rank, over all ranks."""
        made = build(self.recipe, self.settings, group)
        found: Curves = {}
        for batch in made.feed.batches(start=0, end=made.cadence.end):
            sums = train_step(made.training, batch)
            names = sums.names()
            numbers = range(sums.first, sums.first + sums.size)
            rows = tensor_of(sums.rows(), names, device=group.device)
            for name, (total, count) in sum_by_name(
                group, rows, names=names, order=numbers
            ).items():
                found.setdefault(name, []).append(total / count)
        made.training.control_packet.close()
        self.trained = made.training.model
        if made.training.average is not None:
            average = made.training.average
            self.average = dict(zip(average.names, average.averages, strict=True))
        return found

    def model(self) -> nn.Module:
        """Returns the model with the first weights of a run."""
        torch.manual_seed(key(self.settings.seed, Purpose.WEIGHTS))
        model: nn.Module = self.recipe.model()
        return model.double() if self.settings.precision == "fp64" else model

    def batches(self) -> Iterator[Any]:
        """Yields each step's whole global batch of a map-style data set, by the epoch's order alone."""
        for step in range(self.settings.max_steps):
            yield self._batch(step, begin=0, end=self.settings.global_batch)

    def micro_batches(self, step: int, *, objective: int = 0) -> Iterator[Any]:
        """Yields the micro-batches of a step, each with the generators as the forward pass of its loss finds them."""
        size = self.settings.micro_batch
        for number, begin in enumerate(range(0, self.settings.global_batch, size)):
            batch = self._batch(step, begin=begin, end=begin + size)
            base = forward_key(self.settings.seed, objective=objective)
            seed_forward(base, step, number, device=CPU)
            yield batch

    @cached_property
    def _data(self) -> Data:
        return as_data(self.recipe.train_data())

    def _batch(self, step: int, *, begin: int, end: int) -> Any:
        data = self._data
        size = len(data)
        seed = self.settings.seed
        order_of = data.order or permutation
        length = len(order_of(seed, 0, size))
        epoch, k = divmod(step, length // self.settings.global_batch)
        order = np.asarray(order_of(seed, epoch, size))
        places = slice(k * self.settings.global_batch + begin, k * self.settings.global_batch + end)
        indices = order[places]
        again = occurrences_in(order)
        occurrences = None if again is None else again[places]

        def draws() -> Draws:
            return Draws(seed, epoch, indices, occurrences=occurrences)

        read = getattr(data.dataset, "__getitems__", None)
        if read is None:
            collate = data.collate or default_collate
            batch = collate([data.dataset[index] for index in indices.tolist()])
        elif "draws" in inspect.signature(read).parameters:
            batch = read(indices, draws())
        else:
            batch = read(indices.tolist())
        if data.augment is not None:
            batch = data.augment(batch, draws())
        return self.placed(batch)

    def placed(self, batch: Any) -> Any:
        """Returns a batch in the run's precision."""
        if self.settings.precision != "fp64":
            return batch
        return map_tensors(batch, lambda x: x.double() if x.dtype == torch.float32 else x)


def assert_equal(ours: list[float], bare: list[float], *, within: float = 1e-9) -> None:
    """Asserts that two curves are equal step by step, have moved, and have at least ten steps."""
    assert len(ours) == len(bare) >= 10
    far = [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, bare, strict=True)]
    assert max(far) <= within, (far, ours, bare)
    assert abs(bare[0] - bare[-1]) > 1e-4
