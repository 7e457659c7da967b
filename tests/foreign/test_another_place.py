"""Runs that go on with other data or another global batch: the place in the data stays, whatever the step counter says."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, recipe, vectors
from lives import Life, live
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import IterableDataset, Subset

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, process_group
from ddp_kit.checkpoint.state_dict import state_of
from ddp_kit.data.cursor import cursor_for
from ddp_kit.data.seeding import permutation
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import read_json
from ddp_kit.testing import run_ranks

SIZE = 240


@dataclass(frozen=True, kw_only=True)
class Long(Settings):
    """4 epochs of 10 steps, every step recorded."""

    epochs: int = 4
    max_steps: int = 0
    log_every: int = 1


class Stream(IterableDataset[Any]):
    """Has a length. With a state of its own, if it `keeps` one."""

    def __init__(self, size: int = SIZE):
        self.samples = vectors(size)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Any]:
        yield from self.samples


class Stateful(Stream):
    at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.at, len(self.samples)):
            self.at = index + 1
            yield self.samples[index]
        self.at = 0


class Unsized(Stream):
    def __len__(self) -> int:
        raise TypeError("no length")


DATA: dict[str, Any] = {"map": vectors, "stream": Stream, "stateful": Stateful}


def seen_by(settings: Settings, seen: list[list[float]], data: Any) -> Recipe:
    """A recipe that notes the first feature of the samples of each training step."""

    def loss(model: nn.Module, batch: Any) -> LossSum:
        if model.training:
            seen.append(batch[0][:, 0].tolist())
        return classify(model, batch)

    return recipe(
        settings,
        loss=loss,
        train_data=lambda: data,
        eval_data=lambda: vectors(24),
        scheduler=lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 - step / total),
    )


def go(settings: Settings, path: Path, data: Any) -> tuple[Life, list[list[float]]]:
    """Trains. Returns the life and the samples of its steps, without the dry run's."""
    seen: list[list[float]] = []
    life = live(lambda own: seen_by(own, seen, data), replace(settings, run_dir=str(path)))
    steps = [record for record in life.records if record["kind"] == "train"]
    return life, seen[len(seen) - len(steps) :]


def of_kind(life: Life, kind: str, *names: str) -> list[tuple[Any, ...]]:
    found = [record for record in life.records if record["kind"] == kind]
    return [tuple(record[name] for name in names) for record in found]


def flat(steps: list[list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(steps))


# Another length


OTHERS: dict[str, tuple[Any, str]] = {
    "longer": (vectors(264), "240 samples .*264 samples"),
    "shorter": (vectors(216), "240 samples .*216 samples"),
    "a subset": (Subset(vectors(), range(120)), "240 samples .*120 samples"),
    "another epoch": (
        Data(vectors(), order=lambda seed, epoch, size: np.arange(120)),
        "240 samples .*240 samples, 120 an epoch",
    ),
    "a stream": (Stream(264), "240 samples .*264 samples"),
    "a stream without length": (Unsized(), "240 samples .*of unknown length"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_data_of_another_length_are_refused_with_both_unless_they_are_named(
    other: str, tmp_path: Path
) -> None:
    data, words = OTHERS[other]
    first = Settings(max_steps=5)
    go(first, tmp_path / "run", vectors())
    second = Settings(max_steps=8, change=("max_steps",))
    with pytest.raises(ConfigError, match=rf"(?s)training data +{words}.*--change data") as caught:
        go(second, tmp_path / "run", data)
    assert "max_steps" not in str(caught.value)
    life, _ = go(replace(second, change=("max_steps", "data")), tmp_path / "run", data)
    assert (life.step, life.reason) == (8, "")
    # It is bound anew.
    with pytest.raises(ConfigError, match="training data"):
        go(replace(second, max_steps=9), tmp_path / "run", vectors())


def test_data_of_the_same_length_go_on_unnamed(tmp_path: Path) -> None:
    go(Settings(max_steps=5), tmp_path / "run", vectors())
    life, _ = go(Settings(max_steps=8, change=("max_steps",)), tmp_path / "run", Stream())
    assert life.step == 8


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_of_a_run_refuses_them_and_takes_its_own(
    world_size: int, tmp_path: Path
) -> None:
    for size, words in ((SIZE, ""), (SIZE + 24, "training data"), (SIZE, "")):
        for refused in run_ranks(refusal, world_size, str(tmp_path), size, group=False):
            assert bool(refused) == bool(words)
            assert words in refused


def refusal(folder: str, size: int) -> str:
    """Goes on with so many samples. Returns how that was refused."""
    settings = Settings(max_steps=4, change=("max_steps",))
    try:
        go(settings, Path(folder) / "run", vectors(size))
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_with_other_data_the_run_goes_on_after_as_many_epochs(kind: str, tmp_path: Path) -> None:
    make = DATA[kind]
    go(Long(epochs=2), tmp_path / "run", make())
    life, seen = go(Long(epochs=4, change=("epochs", "data")), tmp_path / "run", make(360))
    # 2 epochs of 10 steps, and 2 of 15.
    assert life.step == 50
    assert of_kind(life, "train", "step", "epoch", "samples")[0] == (21, 2, 21 * 24)
    assert of_kind(life, "train", "step", "epoch", "samples")[-1] == (50, 3, 50 * 24)
    assert of_kind(life, "eval", "step", "epoch") == [(35, 2), (50, 3)]
    every = sorted(vectors(360).tensors[0][:, 0].tolist())
    assert sorted(flat(seen[:15])) == every == sorted(flat(seen[15:]))


# Another global batch


@pytest.mark.parametrize(
    ("kind", "batch", "per_epoch"),
    [("map", 48, 5), ("map", 12, 20), ("map", 60, 4), ("stream", 48, 5), ("stateful", 12, 20)],
)
def test_after_whole_epochs_another_global_batch_goes_on_with_the_next_one(
    batch: int, per_epoch: int, kind: str, tmp_path: Path
) -> None:
    make = DATA[kind]
    go(Long(max_steps=20), tmp_path / "run", make())
    changed = Long(global_batch=batch, change=("global_batch",))
    life, seen = go(changed, tmp_path / "run", make())
    end = 20 + 2 * per_epoch
    assert (life.step, life.reason) == (end, "")
    steps = list(range(21, end + 1))
    samples = [480 + batch * (step - 20) for step in steps]
    epochs = [2 + (step - 21) // per_epoch for step in steps]
    found = of_kind(life, "train", "step", "epoch", "samples")
    assert found == list(zip(steps, epochs, samples, strict=True))
    assert samples[-1] == 4 * SIZE
    assert of_kind(life, "eval", "step", "epoch") == [(20 + per_epoch, 2), (end, 3)]
    every = sorted(vectors().tensors[0][:, 0].tolist())
    for epoch in range(2):
        own = seen[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(flat(own)) == every


@pytest.mark.parametrize("length", [96, 100, 119])
@pytest.mark.parametrize("after", [10, 16, 24, 33, 96])
def test_ragged_tails_do_not_add_up_to_an_epoch(after: int, length: int) -> None:
    before = 10
    for step in range(300):
        epoch, k = divmod(step, length // before)
        told = {"step": step, "epoch": epoch, "offset": k * before, "samples": step * before}
        cursor, again = cursor_for(told, global_batch=after, length=length)
        per_epoch = length // after
        found, batch = divmod(cursor.batches(step), per_epoch)
        assert cursor.samples(step, global_batch=after) == step * before
        if found == epoch:
            assert batch * after + again == k * before
            assert again < after
        else:
            # Less than one of the new batches is left of the epoch.
            assert (found, batch, again) == (epoch + 1, 0, 0)
            assert length - k * before < after + length % after


def in_order(epoch: int) -> list[float]:
    return vectors().tensors[0][:, 0][permutation(0, epoch, SIZE)].tolist()


@pytest.mark.parametrize(
    ("batch", "begin", "again", "left"), [(48, 48, 24, 4), (12, 72, 0, 14), (36, 72, 0, 4)]
)
def test_within_an_epoch_the_place_is_that_of_the_samples_rounded_down_to_a_batch(
    batch: int, begin: int, again: int, left: int, tmp_path: Path
) -> None:
    go(Long(max_steps=13), tmp_path / "run", vectors())
    changed = Long(epochs=3, global_batch=batch, change=("global_batch", "epochs"))
    life, seen = go(changed, tmp_path / "run", vectors())
    at = 13 + left
    end = at + SIZE // batch
    assert life.step == end
    assert flat(seen[:left]) == in_order(1)[begin : begin + left * batch]
    assert of_kind(life, "train", "step", "epoch", "samples")[left - 1 : left + 1] == [
        (at, 1, 13 * 24 + left * batch),
        (at + 1, 2, 13 * 24 + (left + 1) * batch),
    ]
    assert of_kind(life, "eval", "step", "epoch") == [(at, 1), (end, 2)]
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert (f"{again} samples come again" in log) == bool(again)


def test_a_stream_with_a_state_of_its_own_repeats_no_sample(tmp_path: Path) -> None:
    go(Long(max_steps=13), tmp_path / "run", Stateful())
    changed = Long(epochs=2, global_batch=48, change=("global_batch", "epochs"))
    life, seen = go(changed, tmp_path / "run", Stateful())
    # 72 of 240 samples are read: 168 are left, 3 batches of 48.
    assert life.step == 16
    assert flat(seen) == vectors().tensors[0][:, 0][72:216].tolist()
    assert of_kind(life, "eval", "step", "epoch") == [(16, 1)]


def test_a_schedule_is_at_the_share_of_the_training_that_is_done(tmp_path: Path) -> None:
    go(Long(max_steps=20), tmp_path / "run", vectors())
    changed = Long(global_batch=48, change=("global_batch",))
    life, _ = go(changed, tmp_path / "run", vectors())
    # Of 20 steps of the new kind 10 are done.
    rates = [rate for (rate,) in of_kind(life, "train", "lr")]
    assert rates == pytest.approx([0.1 * (1 - step / 20) for step in range(10, 20)])


def test_steps_as_the_length_of_a_run_stay_steps(tmp_path: Path) -> None:
    settings = Long(epochs=0, max_steps=40)
    go(replace(settings, max_steps=20), tmp_path / "run", vectors())
    changed = replace(settings, global_batch=48, change=("global_batch", "max_steps"))
    life, _ = go(changed, tmp_path / "run", vectors())
    assert life.step == 40
    rates = [rate for (rate,) in of_kind(life, "train", "lr")]
    assert rates == pytest.approx([0.1 * (1 - step / 40) for step in range(20, 40)])
    assert of_kind(life, "train", "step", "epoch", "samples")[-1] == (40, 5, 480 + 20 * 48)
    assert of_kind(life, "eval", "step", "epoch") == [(25, 2), (30, 3), (35, 4), (40, 5)]


def test_a_stream_without_a_length_goes_on_by_samples(tmp_path: Path) -> None:
    settings = Long(epochs=0, max_steps=4)
    go(settings, tmp_path / "run", Unsized())
    changed = replace(settings, max_steps=6, global_batch=48, change=("global_batch", "max_steps"))
    life, seen = go(changed, tmp_path / "run", Unsized())
    assert flat(seen) == vectors().tensors[0][:, 0][96:192].tolist()
    assert of_kind(life, "train", "step", "samples") == [(5, 144), (6, 192)]


@pytest.mark.parametrize("kind", DATA)
def test_lives_after_a_change_go_on_from_its_place_and_change_again(
    kind: str, tmp_path: Path
) -> None:
    make = DATA[kind]
    changed = Long(global_batch=48, change=("global_batch",))
    for name, ends in (("whole", [0]), ("stopped", [27, 0])):
        go(Long(max_steps=20), tmp_path / name, make())
        for number, end in enumerate(ends):
            own = replace(changed, max_steps=end, change=() if number else changed.change)
            life, seen = go(own, tmp_path / name, make())
        if name == "whole":
            whole = life
            expected = seen
    assert life.step == whole.step == 30
    assert seen == expected[7:]
    assert all(torch.equal(life.state[key], whole.state[key]) for key in whole.state)
    losses = of_kind(whole, "train", "step", "loss")
    assert of_kind(life, "train", "step", "loss") == losses[7:]
    again, _ = go(
        Long(epochs=5, global_batch=24, change=("global_batch", "epochs")),
        tmp_path / name,
        make(),
    )
    assert again.step == 40
    assert of_kind(again, "train", "step", "epoch", "samples")[-1] == (40, 4, 5 * SIZE)


def test_the_status_and_the_checkpoints_say_the_same_place(tmp_path: Path) -> None:
    go(Long(max_steps=20), tmp_path / "run", vectors())
    go(Long(max_steps=27, global_batch=48, change=("global_batch",)), tmp_path / "run", vectors())
    assert read_json(tmp_path / "run" / "status.json")["epoch"] == 3
    manifest = read_json(tmp_path / "run" / "checkpoints" / "step-00000027" / "manifest.json")
    assert manifest["cursor"] == {"step": 27, "epoch": 3, "samples": 480 + 7 * 48}


def test_a_checkpoint_of_before_is_taken_for_one_of_todays_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("ddp_kit.lifecycle.run.described", lambda feed: "")
        patched.setattr("ddp_kit.checkpoint.checkpointer.state_of", without_cursor)
        go(Long(max_steps=20), tmp_path / "run", vectors())
    changed = Long(global_batch=48, change=("global_batch",))
    life, _ = go(changed, tmp_path / "run", vectors())
    assert of_kind(life, "train", "step", "epoch", "samples")[-1] == (30, 3, 4 * SIZE)


def without_cursor(training: Any, *, early_stopping: Any, more: dict[str, Any]) -> Any:
    del more["cursor"]
    return state_of(training, early_stopping=early_stopping, more=more)


# A loop of one's own


def test_a_loop_of_ones_own_is_told_of_another_global_batch(tmp_path: Path) -> None:
    with process_group(device="cpu") as group:
        for batch in (24, 24, 48):
            settings = Settings()
            model = recipe(settings).model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            feed = ddp_kit.build_loader(vectors(), group=group, global_batch=batch)
            training = ddp_kit.wrap(model, optimizer, classify, group=group, feed=feed)
            if batch == 48:
                with pytest.raises(ConfigError, match=r"global batch of 24 samples, .* 48"):
                    ddp_kit.restore(training, tmp_path)
                break
            start = ddp_kit.restore(training, tmp_path)
            for step in feed.batches(start=start, end=start + 2):
                ddp_kit.train_step(training, step)
            ddp_kit.save(training, tmp_path)
            training.checkpoints.finish()
        assert start == 2


def test_other_schedules_go_by_the_same_count(tmp_path: Path) -> None:
    def stepped(settings: Settings) -> Recipe:
        return recipe(settings, scheduler=lambda optimizer, total: StepLR(optimizer, 5))

    go_on = Long(epochs=3, global_batch=48, change=("global_batch", "epochs"))
    for settings in (Long(max_steps=20), go_on):
        life = live(stepped, replace(settings, run_dir=str(tmp_path / "run")))
    rates = [rate for (rate,) in of_kind(life, "train", "lr")]
    assert rates == pytest.approx([0.1 * 0.1**2] * 5)
