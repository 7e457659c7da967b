"""Freezing and thawing in the course of a run: `Recipe(frozen=...)` is bare torch's `requires_grad_`, and nobody else's change of it is trained with."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, Trace, classify, distance, recipe, trace, vectors
from gans import fooled, gan
from lives import Life, live
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset, TensorDataset

import ddp_kit
from ddp_kit import Data, LossSum, Recipe
from ddp_kit.cli.plan.model_size import build as planned
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.polling import wait_until
from ddp_kit.setup.build import build, build_model
from ddp_kit.testing import RanksError, assert_same_on_all_ranks, run_ranks, start_ranks
from ddp_kit.training.step import train_step

STEPS = 4  # of an epoch


class Reader(nn.Module):
    """What is fine-tuned: blocks below a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).tanh()
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(self.norm(x))


# As people write them.


def gradual(epoch: int) -> list[str]:
    """One more layer from the top each epoch, as ULMFiT has it."""
    layers = ["embed.*", "blocks.0.*", "blocks.1.*", "norm.*"]
    return layers[: max(0, 4 - epoch)]


def head_first(epoch: int) -> list[str]:
    return ["embed.*", "blocks.*", "norm.*"] if epoch < 2 else []


def frozen_later(epoch: int) -> list[str]:
    """The lower half once it is good enough, and for an epoch all but the biases' own."""
    return {0: [], 1: ["embed.*", "blocks.0.*"], 2: ["*.weight"], 3: []}.get(epoch, ["head.*"])


@dataclass(frozen=True)
class In:
    """Answers something in one epoch, and nothing in the others."""

    epoch: int
    answer: Any

    def __call__(self, epoch: int) -> Any:
        return self.answer if epoch == self.epoch else []


HABITS = [gradual, head_first, frozen_later]
SETTINGS = Settings(global_batch=48, epochs=5, max_steps=0, lr=0.05)


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)


def reading(settings: Settings, frozen: Any = gradual, **parts: Any) -> Recipe:
    return recipe(settings, **({"model": Reader, "frozen": frozen, "optimizer": sgd} | parts))


def samples(step: int) -> Any:
    per_epoch = 240 // SETTINGS.global_batch
    at = step % per_epoch * SETTINGS.global_batch
    return permutation(0, step // per_epoch, 240)[at : at + SETTINGS.global_batch]


@dataclass
class Bare:
    """What a loop without ddp_kit has come to."""

    losses: list[float]
    model: nn.Module
    optimizer: torch.optim.Optimizer


def bare(
    settings: Settings, frozen: Callable[[int], list[str]], make: Any, *, clip: float = 0.0
) -> Bare:
    """Trains by hand: one rank, whole batches, `requires_grad_` where an epoch begins."""
    from fnmatch import fnmatchcase

    with process_group(topology=Topology(), device="cpu") as group:
        model = build_model(reading(settings), settings, group)
    optimizer = make(model)
    dtype = next(model.parameters()).dtype
    losses = []
    for step in range(5 * settings.epochs):
        for name, parameter in model.named_parameters():
            patterns = frozen(step // 5)
            parameter.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in patterns))
        inputs, labels = (tensor[samples(step)] for tensor in vectors().tensors)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs.to(dtype)), labels, reduction="sum") / 48
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return Bare(losses, model, optimizer)


def alone(made: Recipe, settings: Settings) -> Trace:
    with process_group(topology=Topology(), device="cpu") as group:
        return trace(group, made, settings)


# The numbers


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("frozen", HABITS)
@pytest.mark.ranks(1)
def test_one_rank_gives_the_bits_of_bare_torch(group: Group, frozen: Any, make: Any) -> None:
    settings = replace(SETTINGS, precision="fp32", tuning=False)
    made = build(reading(settings, frozen, optimizer=make), settings, group)
    for batch in made.feed.batches(start=0, end=25):
        train_step(made.training, batch)
    expected = bare(settings, frozen, make)
    for (name, own), (_, other) in zip(
        made.training.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        assert torch.equal(own, other), name
        assert own.requires_grad == other.requires_grad
        kept = made.training.objectives[0].optimizer.state.get(own, {})
        theirs = expected.optimizer.state.get(other, {})
        assert kept.keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(kept[key], value), (name, key)


@pytest.mark.parametrize("frozen", HABITS)
@pytest.mark.ranks(1, 2, 3)
def test_any_number_of_ranks_gives_the_numbers_of_bare_torch(group: Group, frozen: Any) -> None:
    expected = {make: bare(SETTINGS, frozen, make, clip=0.3) for make in (sgd, adamw)}
    for make in (sgd, adamw):
        for own in (
            replace(SETTINGS, grad_clip=0.3),
            replace(SETTINGS, grad_clip=0.3, micro_batch=5),
            replace(SETTINGS, grad_clip=0.3, strategy="zero1"),
            replace(SETTINGS, grad_clip=0.3, find_unused_parameters=True),
        ):
            if own.find_unused_parameters and group.world_size == 1:
                continue
            ours = trace(group, reading(own, frozen, optimizer=make), own)
            assert ours.losses == pytest.approx(expected[make].losses, abs=1e-11), own
            assert distance(ours.state, expected[make].model.state_dict()) <= 1e-11
            assert_same_on_all_ranks(ours.state, group)


@pytest.mark.ranks(1, 2)
def test_what_is_frozen_does_not_move_and_has_no_gradient(group: Group) -> None:
    made = build(reading(SETTINGS, frozen_later, optimizer=adamw), SETTINGS, group)
    named = dict(made.training.model.named_parameters())
    moves: dict[int, set[str]] = {}
    for batch in made.feed.batches(start=0, end=25):
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        train_step(made.training, batch)
        moved = {name for name in named if not torch.equal(named[name], before[name])}
        moves.setdefault(batch.epoch, set()).update(moved)
        assert {name for name in named if named[name].grad is not None} == moved
    below = {name for name in named if name.startswith(("embed", "blocks.0"))}
    assert moves[0] == moves[3] == set(named)
    assert moves[1] == set(named) - below
    assert moves[2] == {name for name in named if not name.endswith("weight")}
    assert moves[4] == {name for name in named if not name.startswith("head")}


@pytest.mark.ranks(2, 4)
def test_exact_runs_have_the_bits_of_one_rank(group: Group) -> None:
    settings = replace(
        SETTINGS, exact=True, micro_batch=6, precision="fp32", threads=1, grad_clip=0.3
    )
    ours = trace(group, reading(settings, frozen_later), settings)
    one = alone(reading(settings, frozen_later), settings)
    for name, value in ours.state.items():
        assert torch.equal(value, one.state[name]), name


@pytest.mark.ranks(2)
def test_fp16_with_averaged_weights_gives_the_numbers_of_one_rank(group: Group) -> None:
    settings = replace(SETTINGS, precision="fp16", ema=0.9, micro_batch=8)
    averages = []
    for own in (group, None):
        if own is not None:
            made = build(reading(settings, frozen_later), settings, own)
            for batch in made.feed.batches(start=0, end=25):
                train_step(made.training, batch)
            averages.append(made.training.average.averages)
            continue
        with process_group(topology=Topology(), device="cpu") as single:
            made = build(reading(settings, frozen_later), settings, single)
            for batch in made.feed.batches(start=0, end=25):
                train_step(made.training, batch)
            averages.append(made.training.average.averages)
    for ours, theirs in zip(*averages, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def frozen_generator(epoch: int) -> list[str]:
    return ["generator.0.*"] if epoch == 0 else ["discriminator.2.weight"]


@pytest.mark.ranks(1, 2)
def test_each_objective_trains_what_is_not_frozen_of_its_part(group: Group) -> None:
    settings = Settings(max_steps=20, micro_batch=5)
    made = build(replace(gan(), frozen=frozen_generator), settings, group)
    for batch in made.feed.batches(start=0, end=20):
        train_step(made.training, batch)
    model: Any = build_model(gan(), settings, group)
    optimizers = [part.optimizer(model.get_submodule(part.trains)) for part in gan().parts()]
    losses = [part.loss for part in gan().parts()]
    scheduler = gan().parts()[1].scheduler(optimizers[1], 20)
    for step in range(20):
        order = permutation(0, step // 10, 240)[step % 10 * 24 : (step % 10 + 1) * 24]
        batch = [vectors().tensors[0][order].double()]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            model.zero_grad()
            (loss(model, batch).total / 24).backward()
            for name, parameter in model.named_parameters():
                is_frozen = name.startswith("generator.0.")
                if step >= 10:
                    is_frozen = name == "discriminator.2.weight"
                if is_frozen:
                    parameter.grad = None
            optimizer.step()
        scheduler.step()
    assert distance(made.training.model.state_dict(), model.state_dict()) <= 1e-10


@pytest.mark.ranks(1, 2)
def test_a_list_freezes_for_the_whole_run_as_the_model_itself_would(group: Group) -> None:
    def frozen_by_hand() -> nn.Module:
        model = Reader()
        model.embed.requires_grad_(False)
        model.head.bias.requires_grad_(False)
        return model

    settings = replace(SETTINGS, epochs=1)
    ours = trace(group, reading(settings, ["embed.*", "head.bias"]), settings)
    by_hand = trace(group, reading(settings, (), model=frozen_by_hand), settings)
    assert ours.losses == by_hand.losses
    for name, value in ours.state.items():
        assert torch.equal(value, by_hand.state[name]), name


class Tied(Reader):
    """A weight of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].weight = self.blocks[0].weight


@pytest.mark.ranks(1, 2)
def test_a_pattern_may_be_of_any_name_of_a_tied_weight(group: Group) -> None:
    settings = replace(SETTINGS, epochs=1)
    made = build(reading(settings, In(0, ["blocks.1.weight"]), model=Tied), settings, group)
    before = made.training.model.blocks[0].weight.detach().clone()
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    assert torch.equal(made.training.model.blocks[0].weight, before)


@pytest.mark.ranks(1)
def test_a_plan_knows_what_a_list_freezes(group: Group) -> None:
    settings = replace(SETTINGS, global_batch=24)
    model = planned(reading(settings, ["embed.*", "blocks.*"]), settings)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.mark.ranks(2)
def test_zero1_leaves_weights_where_they_are_in_memory(group: Group) -> None:
    """torch's own lays them into other buckets, and warns of it, while a save may read them."""
    settings = replace(SETTINGS, strategy="zero1")
    made = build(reading(settings, frozen_later), settings, group)
    parameters = list(made.training.model.parameters())
    before = [parameter.data_ptr() for parameter in parameters]
    for batch in made.feed.batches(start=0, end=11):
        train_step(made.training, batch)
    assert [parameter.data_ptr() for parameter in parameters] == before


def toggled(model: Any, batch: Any) -> LossSum:
    """A generator's loss as many write it: the discriminator is frozen for its time."""
    for parameter in model.discriminator.parameters():
        parameter.requires_grad = False
    result = fooled(model, batch)
    for parameter in model.discriminator.parameters():
        parameter.requires_grad = True
    return result


@pytest.mark.ranks(1, 2)
def test_a_loss_may_freeze_the_part_of_another_objective_for_itself(group: Group) -> None:
    settings = Settings(max_steps=6)
    judges, fools = gan().parts()
    toggling = replace(gan(), objectives=[judges, replace(fools, loss=toggled)])
    ends = []
    for made in (gan(), toggling):
        built = build(made, settings, group)
        for batch in built.feed.batches(start=0, end=6):
            train_step(built.training, batch)
        ends.append(built.training.model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(ends[1][name], value), name


# Going on


class Wide(nn.Module):
    """Of several buckets of DDP, which change places after the first backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(700, 4)
        self.blocks = nn.ModuleList([nn.Linear(700, 700)])
        self.embed = nn.Linear(6, 700)
        self.norm = nn.LayerNorm(700)
        self.blocks.append(nn.Linear(700, 700))

    forward = Reader.forward


class Dies:
    """Kills rank 1 after a step, once a checkpoint of another step is whole."""

    def __init__(self, folder: Path, after: int, saved: int):
        self.after = after
        self.manifest = folder / "checkpoints" / f"step-{saved:08d}" / "manifest.json"

    def on_start(self, model: Any) -> None:
        pass

    def on_step(self, step: int) -> None:
        if step == self.after:
            assert wait_until(self.manifest.exists, within_s=60, pause_s=0.01)
            if os.environ.get("RANK") == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def going_on(settings: Settings, frozen: Any = gradual, **parts: Any) -> Recipe:
    return reading(settings, frozen, **({"optimizer": adamw} | parts))


def attempt(settings: Settings, ranks: int, *, until: int = 0, make: Any = going_on) -> Life:
    own = replace(settings, max_steps=until)
    return run_ranks(live, ranks, make, own, group=False)[0]


def by_turns(epoch: int) -> list[str]:
    return ["embed.*"] if epoch < 2 else ["head.bias"]


def wide(settings: Settings) -> Recipe:
    return going_on(settings, by_turns, model=Wide)


def with_sgd(settings: Settings) -> Recipe:
    return going_on(settings, frozen_later, optimizer=sgd)


@pytest.mark.parametrize("until", [8, 10, 13])
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_never_stopped(
    tmp_path: Path, until: int
) -> None:
    """Before the thaw, at it, and after it in the middle of an epoch."""
    settings = replace(SETTINGS, epochs=3, precision="fp32", threads=1)
    whole = attempt(replace(settings, run_dir=str(tmp_path / "whole")), 3, make=wide)
    cut = replace(settings, run_dir=str(tmp_path / "cut"))
    attempt(cut, 3, until=until, make=wide)
    resumed = attempt(cut, 3, make=wide)
    assert resumed.step == whole.step == 15
    for name, value in whole.state.items():
        assert torch.equal(resumed.state[name], value), name


@pytest.mark.parametrize("make", [going_on, with_sgd])
def test_any_number_of_ranks_goes_on_from_any_other(tmp_path: Path, make: Any) -> None:
    whole = attempt(replace(SETTINGS, run_dir=str(tmp_path / "whole")), 1, make=make)
    cut = replace(SETTINGS, run_dir=str(tmp_path / "cut"))
    for ranks, until in ((2, 3), (1, 7), (3, 12), (2, 16), (1, 0)):
        resumed = attempt(cut, ranks, until=until, make=make)
    assert resumed.step == 25
    assert distance(resumed.state, whole.state) <= 1e-11


def dying(settings: Settings) -> Recipe:
    return going_on(settings, callbacks=[Dies(Path(settings.run_dir), after=12, saved=11)])


def trained(settings: Settings, make: Any) -> None:
    ddp_kit.run(make(settings), settings)


def test_a_run_that_was_killed_after_a_thaw_goes_on(tmp_path: Path) -> None:
    whole = attempt(replace(SETTINGS, run_dir=str(tmp_path / "whole")), 1)
    cut = replace(SETTINGS, run_dir=str(tmp_path / "cut"), save_every=11)
    with start_ranks(trained, 2, cut, dying, group=False) as ranks:
        assert -signal.SIGKILL in [report.exit_code for report in ranks.wait()]
    resumed = attempt(cut, 3)
    assert resumed.step == 25
    assert distance(resumed.state, whole.state) <= 1e-11


# Somebody else's change


def unfreeze(model: nn.Module) -> None:
    for parameter in model.embed.parameters():
        parameter.requires_grad_(True)


def freeze(model: nn.Module) -> None:
    for parameter in model.embed.parameters():
        parameter.requires_grad = False


class Finetuning:
    """A callback as fine-tuning has it."""

    def __init__(self, change: Any, *, at: int, rank: int = -1):
        self.change = change
        self.at = at
        self.rank = rank

    def on_start(self, model: Any) -> None:
        self.model = model
        self.on_step(0)

    def on_step(self, step: int) -> None:
        if step == self.at and self.rank in (-1, int(os.environ.get("RANK", "0"))):
            self.change(self.model)

    def on_evaluation(self, step: int, metrics: Any) -> None:
        pass

    def on_end(self, reason: str) -> None:
        pass


def pretrained() -> Reader:
    model = Reader()
    freeze(model)
    return model


def thaws(settings: Settings) -> Recipe:
    change = Finetuning(unfreeze, at=2)
    return reading(settings, (), model=pretrained, callbacks=[change])


def thaws_on_one_rank(settings: Settings) -> Recipe:
    change = Finetuning(unfreeze, at=2, rank=0)
    return reading(settings, (), model=pretrained, callbacks=[change])


def freezes(settings: Settings) -> Recipe:
    return reading(settings, (), callbacks=[Finetuning(freeze, at=2)])


def freezes_at_start(settings: Settings) -> Recipe:
    return reading(settings, (), callbacks=[Finetuning(freeze, at=0)])


def freezes_beside(settings: Settings) -> Recipe:
    """What is frozen by the epoch is thawed too early."""
    return reading(settings, head_first, callbacks=[Finetuning(unfreeze, at=2)])


def freezes_in_the_loss(settings: Settings) -> Recipe:
    calls = []

    def loss(model: Any, batch: Any) -> LossSum:
        calls.append(1)
        if model.training and len(calls) > 12:
            freeze(model)
        return classify(model, batch)

    return reading(settings, (), loss=loss)


def thaws_in_the_loss(settings: Settings) -> Recipe:
    calls = []

    def loss(model: Any, batch: Any) -> LossSum:
        calls.append(1)
        if len(calls) > 12:
            unfreeze(model)
        return classify(model, batch)

    return reading(settings, (), model=pretrained, loss=loss)


def freezes_in_evaluate(settings: Settings) -> Recipe:
    has_begun = []

    def evaluate(model: Any, batch: Any) -> Any:
        if has_begun:
            freeze(model)
        return classify(model, batch).sums()

    return reading(
        settings,
        (),
        evaluate=evaluate,
        eval_data=vectors,
        callbacks=[Finetuning(has_begun.append, at=1)],
    )


def freezes_all(settings: Settings) -> Recipe:
    def freeze_all(model: nn.Module) -> None:
        model.requires_grad_(False)

    return reading(settings, (), callbacks=[Finetuning(freeze_all, at=2)])


CHANGES = [
    (thaws, "True"),
    (freezes, "False"),
    (freezes_at_start, "False"),
    (freezes_beside, "True"),
    (freezes_in_the_loss, "False"),
    (thaws_in_the_loss, "True"),
    (freezes_in_evaluate, "False"),
    (freezes_all, "False"),
]


def refused(settings: Settings, make: Any) -> int:
    """Returns the steps that were taken before."""
    taken = []

    class Counts(Finetuning):
        def on_step(self, step: int) -> None:
            taken.append(step)

    made = make(settings)
    counted = replace(made, callbacks=[*made.callbacks, Counts(None, at=-1)])
    # A rank that is a little behind loses its peer.
    with pytest.raises((DdpKitError, RuntimeError)):
        ddp_kit.run(counted, settings)
    return taken[-1]


@pytest.mark.parametrize(("make", "now"), CHANGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_change_that_only_torch_hears_of_is_refused_by_its_name(
    tmp_path: Path, make: Any, now: str, ranks: int
) -> None:
    settings = replace(SETTINGS, epochs=3, run_dir=str(tmp_path))
    assert max(run_ranks(refused, ranks, settings, make, group=False)) <= 12
    said = json.loads((tmp_path / "status.json").read_text())["reason"]
    assert "requires_grad of embed.weight, embed.bias" in said
    assert f"was changed to {now} after the start" in said
    assert 'Recipe(frozen=["embed.weight"])' in said


def test_a_change_on_one_rank_ends_all_by_its_name(tmp_path: Path) -> None:
    settings = replace(SETTINGS, run_dir=str(tmp_path))
    with pytest.raises(RanksError, match=r"requires_grad of embed.weight, embed.bias was changed"):
        run_ranks(trained, 2, settings, thaws_on_one_rank, group=False)


class Skips(Reader):
    """Leaves a block out in a later step."""

    def __init__(self) -> None:
        super().__init__()
        self.skips = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).tanh()
        if not self.skips:
            x = x + self.blocks[0](x).tanh()
        return self.head(self.norm(x + self.blocks[1](x)))


@pytest.mark.ranks(2)
def test_what_a_loss_leaves_out_beside_frozen_parameters_is_named_right(group: Group) -> None:
    made = build(reading(SETTINGS, lambda epoch: ["embed.*"], model=Skips), SETTINGS, group)
    batches = made.feed.batches(start=0, end=2)
    train_step(made.training, next(batches))
    made.training.model.skips = True
    with pytest.raises(DdpKitError, match=r"^blocks.0.weight, blocks.0.bias got no gradient"):
        train_step(made.training, next(batches))


class InStep(torch.optim.SGD):
    """Gives parameters without a gradient one of zeros, as some do to keep ranks in step."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        super().step()


@pytest.mark.ranks(1, 2)
def test_an_optimizer_that_moves_what_is_frozen_is_refused(group: Group) -> None:
    def decaying(model: Any) -> Any:
        return InStep(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)

    made = build(reading(SETTINGS, frozen_later, optimizer=decaying), SETTINGS, group)
    batches = made.feed.batches(start=0, end=6)
    for _ in range(5):
        train_step(made.training, next(batches))
    with pytest.raises(DdpKitError, match=r"moves blocks.0.bias, .* freezes in epoch 1: it"):
        train_step(made.training, next(batches))


# A loop of one's own


@pytest.mark.ranks(1, 2)
def test_a_loop_of_ones_own_freezes_by_epochs_and_goes_on(group: Group, tmp_path: Path) -> None:
    folder = ddp_kit.distributed.collectives.from_rank(group, str(tmp_path).encode()).decode()

    def started(frozen: Any = head_first) -> tuple[Any, Any]:
        with process_group(topology=Topology(), device="cpu") as single:
            model = build_model(reading(SETTINGS), SETTINGS, single)
        inputs, labels = vectors().tensors
        data = TensorDataset(inputs.double(), labels)
        feed = ddp_kit.build_loader(data, group=group, global_batch=48)
        training = ddp_kit.wrap(
            model, sgd(model), classify, group=group, feed=feed, precision="fp64", frozen=frozen
        )
        return training, feed

    expected = bare(replace(SETTINGS, epochs=3), head_first, sgd)
    training, feed = started()
    for batch in feed.batches(start=0, end=12):
        ddp_kit.train_step(training, batch)
    ddp_kit.save(training, folder)
    training.checkpoints.finish()
    training, feed = started()
    assert ddp_kit.restore(training, folder) == 12
    for batch in feed.batches(start=12, end=15):
        ddp_kit.train_step(training, batch)
    assert distance(training.model.state_dict(), expected.model.state_dict()) <= 1e-11
    freeze(training.model)
    with pytest.raises(DdpKitError, match=r"embed.weight, embed.bias was .* wrap\(frozen=...\)"):
        ddp_kit.train_step(training, batch)
    training, _ = started(["embed.*"])
    assert not training.model.embed.weight.requires_grad


# Refused before the first step


def frozen_model() -> Reader:
    model = Reader()
    model.embed.requires_grad_(False)
    return model


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (["blocks.*", "embd.weight"], r"no parameter named 'embd.weight'; did you mean 'embed"),
        (In(4, ["x"]), r"epoch 4: the model has no parameter named"),
        (In(3, ["*"]), r"in epoch 3 freezes every parameter that"),
        (["*"], r"nothing to train"),
        ("embed.*", r"is 'embed.\*'; expected a list of patterns"),
        (In(0, None), r"in epoch 0 is None; expected a list .* \[\] freezes nothing"),
        (In(0, [3]), r"in epoch 0 is \[3\]; expected a list"),
        ({"embed.*": 2}, r"expected a list of patterns"),
    ],
)
def test_what_cannot_be_frozen_is_refused(group: Group, frozen: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(reading(SETTINGS, frozen), SETTINGS, group)


@pytest.mark.ranks(1, 2)
def test_what_the_model_has_frozen_itself_cannot_be_thawed(group: Group) -> None:
    with pytest.raises(ConfigError, match=r"'embed.\*' names only parameters that the model"):
        build(reading(SETTINGS, head_first, model=frozen_model), SETTINGS, group)


@pytest.mark.ranks(1, 2)
def test_an_objective_with_nothing_to_train_is_refused(group: Group) -> None:
    made = replace(gan(), frozen=lambda epoch: ["discriminator.*"])
    with pytest.raises(ConfigError, match=r"every parameter of Objective\(trains='discriminator'"):
        build(made, Settings(), group)


@pytest.mark.ranks(2)
def test_ranks_that_freeze_differently_are_refused(group: Group) -> None:
    def frozen(epoch: int) -> list[str]:
        return ["embed.*"] if epoch == 2 and group.rank == 1 else []

    with pytest.raises(
        ConfigError,
        match=r"in epoch 2 freezes nothing on rank 0 and embed.bias, embed.weight on rank 1",
    ):
        build(reading(SETTINGS, frozen), SETTINGS, group)


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"strategy": "fsdp"}, r"--strategy fsdp .* Type --strategy ddp or zero1"),
        ({"strategy": "deepspeed"}, r"--strategy deepspeed .* Type --strategy ddp or zero1"),
        ({"save_trainable_only": True}, r"--save-trainable-only: .* a function of the epoch"),
    ],
)
def test_flags_that_freezing_by_epochs_cannot_keep_are_refused(
    group: Group, flags: Mapping[str, Any], message: str
) -> None:
    settings = replace(SETTINGS, precision="fp32", **flags)
    with pytest.raises(ConfigError, match=message):
        build(reading(settings), settings, group)


class Endless(IterableDataset[Any]):
    """Each rank's own, without a length."""

    def __init__(self, rank: int):
        self.rank = rank

    def __iter__(self) -> Any:
        inputs, labels = vectors().tensors
        yield from zip(inputs[self.rank :: 2], labels[self.rank :: 2], strict=True)


@pytest.mark.ranks(1, 2)
def test_each_ranks_own_streams_without_length_have_no_epochs_to_freeze_in(group: Group) -> None:
    settings = replace(SETTINGS, epochs=0, max_steps=10)
    data = Data(Endless(group.rank), sharded=True)
    with pytest.raises(ConfigError, match=r"have no epochs in common. Give them __len__"):
        build(reading(settings, train_data=lambda: data), settings, group)
