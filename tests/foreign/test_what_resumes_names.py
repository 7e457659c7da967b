"""State under names and in types that a file could mix up, and state that a file could not give back: right, or refused at the save."""

from collections import Counter, OrderedDict, namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import classify, plain, vectors
from torch import nn
from torch.optim import SGD

import ddp_kit
from ddp_kit.checkpoint.format import encoding, shard, writer
from ddp_kit.checkpoint.format.encoding import decode, encode
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.testing import current_group
from ddp_kit.training.state import Training


class Point(NamedTuple):
    x: int
    y: int


class Keeps(SGD):
    """Keeps something with each parameter, from the first step on."""

    def __init__(self, params: Any, kept: Any):
        super().__init__(params, lr=0.1)
        self.kept = kept

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"kept": self.kept() if self.kept else None}


def training_of(group: Group, kept: Any) -> Training:
    model = plain()
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    return ddp_kit.wrap(model, Keeps(model.parameters(), kept), classify, group=group, feed=feed)


def saved(group: Group, kept: Any, folder: Path) -> None:
    training = training_of(group, kept)
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    for batch in feed.batches(start=0, end=1):
        ddp_kit.train_step(training, batch)
    ddp_kit.save(training, folder)
    training.checkpoints.finish()


def restored(group: Group, folder: Path) -> Any:
    training = training_of(group, None)
    assert ddp_kit.restore(training, folder) == 1
    optimizer = training.objectives[0].optimizer
    return next(iter(optimizer.state.values()))["kept"]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(same, found, expected))
    return bool(found == expected) and type(found) is type(expected)


COLLIDING = {
    "dots": {"a.b": torch.ones(2), "a": {"b": torch.zeros(3)}},
    "other way round": {"a": {"b": torch.zeros(3)}, "a.b": torch.ones(2)},
    "numbers and texts": {1: torch.ones(2), "1": torch.zeros(2), "x": [torch.ones(1)]},
    "a list": {"a": [torch.ones(1), torch.zeros(1)], "a.1": torch.ones(4), "a.1~2": torch.ones(5)},
    "the mark itself": {"a.b": torch.ones(1), "a.b~2": torch.ones(2), "a": {"b": torch.ones(3)}},
    "deep": {"a": {"b.c": torch.ones(1), "b": {"c": torch.ones(2)}}, "a.b": {"c": torch.ones(3)}},
}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("what", COLLIDING)
def test_names_that_are_joined_by_dots_do_not_collide(
    what: str, group: Group, tmp_path: Path
) -> None:
    saved(group, lambda: COLLIDING[what], tmp_path)
    assert same(restored(group, tmp_path), COLLIDING[what])


@pytest.mark.parametrize(
    "value",
    [
        (1, (2.5, "x"), [float("nan")]),
        torch.Size([2, 3]),
        OrderedDict(a=1),
        Counter("aab"),
        {1: 2, "$tensor": "x"},
        10**4000,
        np.float32(0.5),
    ],
    ids=str,
)
def test_plain_data_come_back(value: Any) -> None:
    found = decode(encode(value, {}, name="x"), {})
    assert str(found) == str(value) or found == value


NAMED = namedtuple("NAMED", "a b")
NOT_PLAIN: dict[str, tuple[Any, str]] = {
    "a named tuple": (Point(1, 2), r"kept is a named tuple \(Point\)"),
    "another one": ({"x": [NAMED(1, 2)]}, r"kept\.x\.0 is a named tuple \(NAMED\)"),
    "a large number": (10**5000, r"kept is an int of more than 14000 bits"),
    "a kind of number": (
        torch.ones(2).to(torch.float8_e4m3fnuz),
        r"kept is a tensor of torch\.float8_e4m3fnuz",
    ),
    "sparse": (torch.eye(3).to_sparse(), r"kept is a tensor of torch\.float32, torch\.sparse"),
    "dimensions": (torch.ones([1] * 65), r"kept has 65 dimensions; a checkpoint holds 64"),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_would_come_back_as_something_else_is_refused_at_the_save_by_name(
    what: str, tmp_path: Path
) -> None:
    value, words = NOT_PLAIN[what]
    with (
        pytest.raises(ConfigError, match=words),
        ddp_kit.process_group(device="cpu") as group,
    ):
        saved(group, lambda: value, tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_lists_in_lists_are_refused_before_they_are_too_deep_to_be_read() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    with pytest.raises(ConfigError, match=f"is deeper than {encoding.DEEPEST} levels"):
        encode(value, {}, name="x")


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    """A slash divides the name of a parameter from the key of its state."""
    with ddp_kit.process_group(device="cpu") as group:
        model = nn.Module()
        model.register_parameter("a", nn.Parameter(torch.ones(2)))
        model.register_parameter("a/b", nn.Parameter(torch.ones(2)))
        optimizer = SGD(model.parameters(), lr=0.1)
        feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)

        def loss(model: nn.Module, batch: Any) -> ddp_kit.LossSum:
            return ddp_kit.LossSum(sum(p.square().sum() for p in model.parameters()), 8)

        training = ddp_kit.wrap(model, optimizer, loss, group=group, feed=feed)
        one, other = model.parameters()
        optimizer.state[one] = {"b/c": torch.ones(1)}
        optimizer.state[other] = {"c": torch.zeros(1)}
        with pytest.raises(ConfigError, match=r"would be optimizer/a/b/c in a checkpoint"):
            ddp_kit.save(training, tmp_path)


# Limits that a reader has


@pytest.mark.ranks(1, 2)
def test_a_state_that_is_longer_than_is_ever_read_is_refused_at_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "JSON_LIMIT", 100_000)
    with pytest.raises(ConfigError, match=r"state.json would have .* for 'objectives', and 100000"):
        saved(current_group(), lambda: ["x" * 1000] * 100, tmp_path)
    assert not list(tmp_path.glob("step-*"))


def test_a_shard_of_more_tensors_than_its_header_may_tell_is_refused_at_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "HEADER_LIMIT", 300)
    with (
        pytest.raises(ConfigError, match=r"the header of a shard would have .* 300 are read"),
        ddp_kit.process_group(device="cpu") as group,
    ):
        saved(group, None, tmp_path)
