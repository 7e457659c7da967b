"""Every item of a run's state matters: a next life that does not get one of them back ends elsewhere.

A run is stopped in the middle. Its checkpoint is written again with one item as a new run would have it (or another value, where that
would be the same), and the life that goes on from there is compared with the one that got everything.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import alone
from paths import KIT
from stored import write

from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.train import main

MORTAL = str(KIT / "mortal.py")
ARGS = [
    "--epochs",
    "1",
    "--width",
    "8",
    "--precision",
    "fp16",
    "--save-every",
    "100",
    "--eval-every",
    "3",
    "--keep",
    "9",
    "--no-tuning",
]
ARGS += [
    "--early-stop.metric",
    "loss",
    "--early-stop.patience",
    "9",
    "--early-stop.min-delta",
    "5",
]  # never better than the first
END, AT = 10, 6
FIXED = r"settings/|run_id$|base_sha256$|tied/|tensors/|course|cursor/|.*/(name|optimizer|schedule)$"  # what the run is, not how far it is
FIXED += r"|objectives/0/groups/0/(?!lr$|initial_lr$)|objectives/0/scale/(is_on|growth_interval)|objectives/0/state/"  # state/: names
FIXED += r"|objectives/0/scheduler/(base_lrs|lr_lambdas|_is_initial|_get_lr_called|_step_count|_last_lr)"  # _last_lr: written by each step


@dataclass(frozen=True)
class Item:
    """The items whose path in the state fits, and what they are in a life that did not get them back."""

    path: str
    left_out: Callable[[Any], Any]


def zero(value: Any) -> Any:
    return torch.zeros_like(value)


ITEMS = {
    "weights": Item(r"model/.*(weight|bias)$", lambda value: value * 0.5),
    "running statistics": Item(r"model/.*running_(mean|var)$", lambda value: value * 0 + 1),
    "batches tracked": Item(r"model/.*num_batches_tracked$", zero),
    "averages": Item(r"ema/", lambda value: value * 0.5),
    "first moments": Item(r"optimizer/.*/exp_avg$", zero),
    "second moments": Item(r"optimizer/.*/exp_avg_sq$", zero),
    "steps of the optimizer": Item(r"optimizer/.*/step$", zero),
    "momentum": Item(r"optimizer/.*/momentum_buffer$", zero),
    "rate": Item(r"objectives/0/groups/0/lr$", lambda value: 0.001),
    "rate that the schedule begins with": Item(
        r"objectives/0/groups/0/initial_lr$", lambda value: 0.001
    ),
    "schedule": Item(r"objectives/0/scheduler/last_epoch$", lambda value: 0),
    "loss scale": Item(r"objectives/0/scale/scale$", lambda value: 1.0),
    "good steps": Item(r"objectives/0/scale/good_steps$", lambda value: 0),
    "early stopping: best": Item(r"early_stopping/best(/\$float)?$", lambda value: -1.0),
    "early stopping: its step": Item(r"early_stopping/best_step$", lambda value: -1),
    "early stopping: patience": Item(r"early_stopping/stale$", lambda value: value + 2),
    "step": Item(r"step$", lambda value: 0),
    "skipped steps": Item(r"skipped$", lambda value: value + 1),
    "best": Item(r"best$", lambda value: "-1.0"),
}
ONLY_IN = {
    "momentum": "sgd",
    "first moments": "adamw",
    "second moments": "adamw",
    "steps of the optimizer": "adamw",
}
CASES = [
    (name, ONLY_IN.get(name, "adamw"))
    for name in ITEMS
    if name != "rate that the schedule begins with"
]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every single value of nested JSON data with its path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from leaves(item, f"{path}/{key}" if path else str(key))


def changed(value: Any, item: Item, path: str = "") -> Any:
    """Returns JSON data with the values of an item left out."""
    if isinstance(value, dict):
        return {
            key: changed(inner, item, f"{path}/{key}" if path else str(key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [
            changed(inner, item, f"{path}/{i}" if path else str(i)) for i, inner in enumerate(value)
        ]
    return item.left_out(value) if re.match(item.path, path) else value


@dataclass
class Saved:
    """A checkpoint in memory."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    facts: dict[str, Any]


def saved(run_dir: Path, step: int) -> Saved:
    opened = open_checkpoint(LocalDisk(run_dir / "checkpoints"), step, group=alone())
    values = json.loads((run_dir / "checkpoints" / opened.folder / "state.json").read_text())
    facts = {
        "run_id": opened.manifest.run_id,
        "best_by": opened.manifest.best_by,
        "metrics": opened.manifest.metrics,
    }
    return Saved({name: opened.tensor(name) for name in opened.kinds}, values, facts)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Saved, Path]]]:
    """For each optimizer: the state in the middle, and a run directory in which a life has stopped there."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERY_STEP", "yes")
        patch.setattr("ddp_kit.distributed.control_packet.INTERVAL_S", 0.0)
        patch.setenv("DEATHS", f"{AT - 2}:0:SIGTERM")
        for optimizer in ("adamw", "sgd"):
            run_dir = tmp_path_factory.mktemp(optimizer) / "run"
            assert main([MORTAL, *ARGS, "--optimizer", optimizer, "--run-dir", str(run_dir)]) == 143
            made[optimizer] = saved(run_dir, AT), run_dir
        patch.setenv("DEATHS", "")
        yield made


def end_of(half: Saved, run_dir: Path, folder: Path, *, optimizer: str) -> tuple[Saved, list[Any]]:
    """Returns the last checkpoint and the losses of a life that begins from `half`."""
    other = folder / "run"
    other.mkdir(parents=True)
    for name in ("settings.json", "status.json"):
        (other / name).write_bytes((run_dir / name).read_bytes())
    write(
        LocalDisk(other / "checkpoints"),
        AT,
        world_size=1,
        tensors=half.tensors,
        values=half.values,
        **half.facts,
    )
    assert main([MORTAL, *ARGS, "--optimizer", optimizer, "--run-dir", str(other)]) == 0
    lines = map(json.loads, (other / "metrics.jsonl").read_text().splitlines())
    return saved(other, END), [
        (line["kind"], line["step"], line.get("loss"), line.get("lr")) for line in lines
    ]


@pytest.fixture(scope="module")
def ends(
    halves: dict[str, tuple[Saved, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Saved, list[Any]]]:
    return {
        name: end_of(half, run_dir, tmp_path_factory.mktemp("end"), optimizer=name)
        for name, (half, run_dir) in halves.items()
    }


def is_same(one: tuple[Saved, list[Any]], other: tuple[Saved, list[Any]]) -> bool:
    are_tensors = all(
        torch.equal(tensor, other[0].tensors[name]) for name, tensor in one[0].tensors.items()
    )
    return are_tensors and one[0].values == other[0].values and one[1] == other[1]


def test_a_life_that_gets_everything_back_ends_where_the_other_one_does(
    halves: Any, ends: Any, tmp_path: Path
) -> None:
    for optimizer, (half, run_dir) in halves.items():
        assert is_same(
            end_of(half, run_dir, tmp_path / optimizer, optimizer=optimizer), ends[optimizer]
        )


@pytest.mark.parametrize(("name", "optimizer"), CASES, ids=[name for name, _ in CASES])
def test_a_life_that_does_not_get_one_item_back_ends_elsewhere(
    halves: Any, ends: Any, tmp_path: Path, name: str, optimizer: str
) -> None:
    (half, run_dir), item = halves[optimizer], ITEMS[name]
    tensors = {
        path: item.left_out(tensor) if re.match(item.path, path) else tensor
        for path, tensor in half.tensors.items()
    }
    values = changed(half.values, item)
    assert values != half.values or any(
        not torch.equal(tensors[path], half.tensors[path]) for path in tensors
    ), "nothing was left out"
    assert not is_same(
        end_of(Saved(tensors, values, half.facts), run_dir, tmp_path, optimizer=optimizer),
        ends[optimizer],
    )


def test_no_item_is_forgotten_here(halves: Any) -> None:
    """What is new in the state gets a line in the table above."""
    for half, _ in halves.values():
        for path in [*half.tensors, *(path for path, _ in leaves(half.values))]:
            fitting = [name for name, item in ITEMS.items() if re.match(item.path, path)]
            assert len(fitting) == (0 if re.match(FIXED, path) else 1), (path, fitting)
