"""A mean where a sum is meant: torch's losses give means. There is a word for it, and what looks like one is named."""

import io
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from cases import (
    Counting,
    Settings,
    classify,
    distance,
    normed,
    plain,
    recipe,
    trace,
    vectors,
    weighted,
)
from gans import gan
from torch import nn
from torch.nn.functional import cross_entropy, dropout, normalize
from torch.utils.data import Dataset

from ddp_kit import Data, LossMean, LossSum, Objective, Recipe, build_loader, wrap
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.setup.build import build

TOTAL = "the loss has a total that does not grow with the samples"


def of_mean(model: nn.Module, batch: Any) -> LossSum:
    """As people have it: cross entropy's own mean."""
    inputs, labels = batch
    logits = model(inputs)
    right = (logits.argmax(1) == labels).sum()
    return LossMean(
        cross_entropy(logits, labels), len(labels), metrics={"accuracy": (right, len(labels))}
    )


def weighted_of_mean(model: nn.Module, batch: Any) -> LossSum:
    """A mean over class weights, as torch divides it, and a term beside it."""
    inputs, labels = batch
    weights = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=inputs.dtype)
    mean = cross_entropy(model(inputs), labels, weight=weights)
    return LossMean(mean, weights[labels].sum()).plus_mean(
        0.01 * sum(p.square().sum() for p in model.parameters())
    )


@pytest.mark.ranks(1, 2)
def test_a_mean_with_its_count_trains_as_its_sum_does(group: Group) -> None:
    for given, reference in ((of_mean, classify), (weighted_of_mean, weighted)):
        settings = Settings(micro_batch=5, max_steps=4)
        ours = trace(group, recipe(settings, loss=given), settings)
        summed = trace(group, recipe(settings, loss=reference), settings)
        assert distance(ours.state, summed.state) <= 1e-12
        assert ours.losses == pytest.approx(summed.losses, abs=1e-12)


@pytest.mark.ranks(1)
def test_what_is_no_mean_of_one_number_is_refused(group: Group) -> None:
    def rows(model: nn.Module, batch: Any) -> LossSum:
        inputs, labels = batch
        return LossMean(cross_entropy(model(inputs), labels, reduction="none"), len(labels))

    with pytest.raises(DdpKitError, match=r"returned LossMean with a total of shape \(24,\)"):
        build(recipe(Settings(), loss=rows), Settings(), group)


def notes(group: Group, loss: Any, **parts: Any) -> list[str]:
    """Returns what is said at start of sums that do not grow."""
    settings = Settings(micro_batch=parts.pop("micro_batch", 12))
    made = build(recipe(settings, loss=loss, **parts), settings, group)
    return [note for note in made.training.notes if "does not grow" in note]


def mistaken(model: nn.Module, batch: Any) -> LossSum:
    inputs, labels = batch
    return LossSum(cross_entropy(model(inputs), labels), len(labels))


def mistaken_in_tokens(model: nn.Module, batch: Any) -> LossSum:
    inputs, labels = batch
    return LossSum(cross_entropy(model(inputs), labels), torch.tensor(7.0) * len(labels))


def mistaken_with_noise(model: nn.Module, batch: Any) -> LossSum:
    inputs, labels = batch
    return LossSum(cross_entropy(model(dropout(inputs, 0.1)), labels), len(labels))


class Sample(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


class Dicts(Dataset[Any]):
    """Samples as people's data sets have them: a mapping, with a text in it."""

    def __len__(self) -> int:
        return 240

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, labels = vectors().tensors
        return {"x": inputs[index], "about": {"y": labels[index], "name": f"sample {index}"}}


def mistaken_in_a_dict(model: nn.Module, batch: Mapping[str, Any]) -> LossSum:
    logits = model(batch["x"])
    return LossSum(cross_entropy(logits, batch["about"]["y"]), len(batch["about"]["name"]))


def named(samples: list[Any]) -> Sample:
    inputs, labels = zip(*samples, strict=True)
    return Sample(torch.stack(inputs), torch.stack(labels))


def mistaken_in_a_tuple(model: nn.Module, batch: Sample) -> LossSum:
    return LossSum(cross_entropy(model(batch.inputs), batch.labels), len(batch.labels))


@pytest.mark.ranks(1, 2)
def test_a_total_that_does_not_grow_with_the_samples_is_named(group: Group) -> None:
    for loss in (mistaken, mistaken_in_tokens, mistaken_with_noise):
        found = notes(group, loss)
        assert len(found) == 1
        assert found[0].startswith(TOTAL)
        assert "LossMean(mean, count)" in found[0]
    assert len(notes(group, mistaken, model=normed)) == 1
    assert len(notes(group, mistaken, micro_batch=2)) == 1
    assert len(notes(group, mistaken_in_a_dict, train_data=Dicts)) == 1
    data = Data(vectors(), collate=named)
    assert len(notes(group, mistaken_in_a_tuple, train_data=lambda: data)) == 1


def a_metric(model: nn.Module, batch: Any) -> LossSum:
    found = classify(model, batch)
    right, count = found.metrics["accuracy"]
    means = {"mean accuracy": (right / count + 1, count), "right": (right + count, count)}
    return LossSum(found.total, found.count, metrics=means)


def a_metric_with_a_gradient(model: nn.Module, batch: Any) -> LossSum:
    """Not detached, as people forget to."""
    found = classify(model, batch)
    sureness = model(batch[0]).softmax(1).amax(1).mean()
    return LossSum(found.total, found.count, metrics={"sureness": (sureness, found.count)})


@pytest.mark.ranks(1, 2)
def test_so_are_metrics_of_the_loss_and_of_evaluate(group: Group) -> None:
    assert "mean accuracy. A pair is (sum, count)" in notes(group, a_metric)[0]
    assert "sureness. A pair is (sum, count)" in notes(group, a_metric_with_a_gradient)[0]

    def evaluate(model: nn.Module, batch: Any) -> dict[str, Any]:
        inputs, labels = batch
        mean = cross_entropy(model(inputs), labels)
        return {"loss": (mean, len(labels)), "right": (mean * len(labels), len(labels))}

    found = notes(group, classify, evaluate=evaluate, eval_data=lambda: vectors(40))
    assert len(found) == 1
    assert found[0].startswith("evaluate has pairs whose sum does not grow")
    assert ": loss. A pair" in found[0]


@pytest.mark.ranks(1)
def test_an_objective_is_named_by_what_it_trains(group: Group) -> None:
    def objective(name: str, loss: Any) -> Objective:
        return Objective(
            loss=lambda both, batch: loss(both[name], batch),
            optimizer=lambda part: torch.optim.SGD(part.parameters()),
            trains=name,
        )

    made = Recipe(
        model=lambda: nn.ModuleDict({"one": plain(), "two": plain()}),
        objectives=[objective("one", classify), objective("two", mistaken)],
        train_data=lambda: vectors(),
    )
    found = build(made, Settings(), group).training.notes
    assert [note for note in found if note.startswith("the loss of two has a total")]
    assert not [note for note in found if note.startswith("the loss of one")]


@pytest.mark.ranks(1)
def test_a_loop_of_ones_own_is_told_too(group: Group) -> None:
    for loss, is_told in ((mistaken, True), (classify, False)):
        said = io.StringIO()
        handler = logging.StreamHandler(said)
        model = plain()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        feed = build_loader(vectors(), group=group, global_batch=24)
        logging.getLogger("ddp_kit").addHandler(handler)
        wrap(model, optimizer, loss, group=group, feed=feed)
        logging.getLogger("ddp_kit").removeHandler(handler)
        assert (TOTAL in said.getvalue()) == is_told


def contrastive(model: nn.Module, batch: Any) -> LossSum:
    """Each sample is told from the others of its micro-batch."""
    inputs, _ = batch
    one = normalize(model(inputs))
    two = normalize(model(inputs + 0.1))
    logits = one @ two.T / 0.1
    own = torch.arange(len(inputs))
    right = (logits.argmax(1) == own).sum()
    # Either way that people have it.
    metrics = {"accuracy": (right, len(inputs)), "recall": (right.double(), len(inputs))}
    return LossSum(cross_entropy(logits, own, reduction="sum"), len(inputs), metrics=metrics)


def retrieved(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Of an evaluation that counts what is nearest within its batch."""
    loss = contrastive(model, batch)
    right, count = loss.metrics["accuracy"]
    return {"tensors": (right, count), "numbers": (int(right), count)}


def heavy(model: nn.Module, batch: Any) -> LossSum:
    """One sample of many has nearly all of the loss."""
    inputs, labels = batch
    weights = (20 * inputs[:, 0]).exp()
    losses = cross_entropy(model(inputs), labels, reduction="none")
    return LossSum((losses * weights).sum(), len(inputs))


def noisy(model: nn.Module, batch: Any) -> LossSum:
    """Draws have all of it, as a first step of diffusion may."""
    inputs, labels = batch
    noise = torch.randn(len(inputs), dtype=inputs.dtype).exp() ** 3
    right = (dropout(model(inputs), 0.9).argmax(1) == labels).sum()
    losses = cross_entropy(model(inputs), labels, reduction="none") * noise
    return LossSum(losses.sum(), len(inputs), metrics={"accuracy": (right, len(inputs))})


def of_means_over_all(model: nn.Module, batch: Any) -> LossSum:
    """What has no count of samples: a mean of micro-batches, said as such."""
    inputs, labels = batch
    return LossSum(cross_entropy(model(inputs), labels), torch.tensor(1.0))


def nothing(model: nn.Module, batch: Any) -> LossSum:
    return LossSum(model(batch[0]).sum() * 0, len(batch[0]))


def of_24(model: nn.Module, batch: Any) -> LossSum:
    """Takes micro-batches of one size."""
    inputs, labels = batch
    assert len(inputs) == 12, "another size"
    return LossSum(cross_entropy(model(inputs), labels), 12)


@pytest.mark.ranks(1, 2)
def test_sums_are_not_named_and_what_cannot_be_tried_is_let_be(group: Group) -> None:
    losses = (
        *(classify, weighted, weighted_of_mean, of_mean, contrastive, heavy, noisy),
        *(of_means_over_all, nothing, of_24),
    )
    for loss in losses:
        assert notes(group, loss) == [], loss
    assert notes(group, classify, model=normed) == []
    assert notes(group, classify, micro_batch=1) == []
    evaluated = {"evaluate": retrieved, "eval_data": lambda: vectors(40)}
    assert notes(group, classify, **evaluated) == []
    settings = Settings()
    assert not [note for note in build(gan(), settings, group).training.notes if "grow" in note]


class Remembering(nn.Module):
    """Keeps its last outputs, in a buffer of their size too, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.hidden: torch.Tensor | None = None
        self.calls = 0
        self.register_buffer("state", torch.zeros(12, 4), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs: torch.Tensor = self.net(inputs)
        self.hidden = outputs.detach()
        self.state = outputs.detach()
        return outputs


@pytest.mark.ranks(1)
def test_trying_leaves_no_trace(group: Group) -> None:
    made = build(recipe(Settings(), model=Remembering), Settings(micro_batch=12), group)
    model = made.training.model
    assert model.calls == 0
    assert torch.equal(model.state, torch.zeros(12, 4).double())
    assert model.hidden is None
    assert all(parameter.grad is None for parameter in model.parameters())
    counting = build(recipe(Settings(), model=Counting), Settings(micro_batch=12), group)
    assert torch.equal(counting.training.model.seen, torch.zeros(6).double())


@pytest.mark.ranks(2, deadline_s=20)
def test_a_loss_that_talks_to_other_ranks_is_tried_as_often_on_each(group: Group) -> None:
    """As a contrastive one that gathers features: what is a suspect on one rank may be none on another."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        found = classify(model, batch)
        seen = torch.full((), float(len(batch[0])))
        dist.all_reduce(seen)
        grows = float(seen) if group.rank else 1.0
        return LossSum(found.total, found.count, metrics={"seen": (grows, found.count)})

    made = build(recipe(Settings(), loss=loss), Settings(), group)
    seen = torch.full((), float(group.rank))
    dist.all_reduce(seen)
    assert float(seen) == 1.0
    made.training.control_packet.close()


class Ring(nn.Module):
    """Keeps the last inputs in a buffer that takes whole batches only, as MoCo's queue does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("ring", torch.zeros(80, 6))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        begin = int(self.place)
        self.ring[begin : begin + len(inputs)] = inputs
        self.place.copy_((self.place + len(inputs)) % len(self.ring))
        return self.linear(inputs)


@pytest.mark.ranks(2)
def test_trying_puts_the_values_of_buffers_back(group: Group) -> None:
    """What is tried has other numbers of samples, after which no batch would fit."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        assert int(model.place) % 20 == 0 or len(batch[0]) != 20
        return classify(model, batch)

    settings = Settings(global_batch=40)
    made = build(recipe(settings, model=Ring, loss=loss), settings, group)
    assert int(made.training.model.place) == 0
