"""A run goes on under another strategy on another number of ranks: optimizer, average and all."""

import importlib.util
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Net, Split, averages, split
from cases import classify, distance, recipe
from launching import train
from paths import KIT

from ddp_kit import Recipe
from ddp_kit.checkpoint.own_loop import restore, save
from ddp_kit.checkpoint.state_dict import state_of
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.setup.build import Built, build
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step

needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed"
)
BLOCKY = str(KIT / "blocky.py")
CHOICES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"strategy": "zero1"},
    "fsdp": {"strategy": "fsdp", "fsdp": Fsdp(wrap=("Block",))},
}
ZERO: dict[str, dict[str, Any]] = {
    f"deepspeed {stage}": {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=stage)}
    for stage in (0, 1, 2, 3)
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": None,
    "sgd": lambda model: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9
    ),
    "plain sgd": lambda model: torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01
    ),
}


def made(name: str, settings: Split, optimizer: str) -> Recipe:
    return (
        split(settings)
        if OPTIMIZERS[optimizer] is None
        else split(settings, optimizer=OPTIMIZERS[optimizer])
    )


def content(composed: Built) -> dict[str, torch.Tensor]:
    """Returns weights and averages, whole."""
    own = {
        name: whole(parameter).detach().clone()
        for name, parameter in composed.training.model.named_parameters()
    }
    return own | {f"ema {name}": tensor for name, tensor in averages(composed.training).items()}


def steps(composed: Built, *, start: int, end: int) -> None:
    for batch in composed.feed.batches(start=start, end=end):
        train_step(composed.training, batch)


def saved_by(choices: dict[str, dict[str, Any]], base: Split, folder: str, optimizer: str) -> None:
    """Every strategy trains for 3 steps and saves."""
    with process_group(device="cpu") as group:
        for name, choice in choices.items():
            settings = replace(base, **choice)
            composed = build(made(name, settings, optimizer), settings, group)
            steps(composed, start=0, end=3)
            save(composed.training, f"{folder}/{name}")
            composed.training.checkpoints.finish(failures=1)
            composed.training.control_packet.close()
            group.closing.close()  # DeepSpeed's engines do not live beside each other


def gone_on(
    choices: dict[str, dict[str, Any]], base: Split, folder: str, optimizer: str
) -> dict[str, dict[str, torch.Tensor]]:
    """Every strategy goes on from what every strategy saved, for 3 steps."""
    found = {}
    with process_group(device="cpu") as group:
        for before, after in product(choices, choices):
            settings = replace(base, **choices[after])
            composed = build(made(after, settings, optimizer), settings, group)
            assert restore(composed.training, f"{folder}/{before}") == 3
            steps(composed, start=3, end=6)
            found[f"{before} -> {after}"] = content(composed)
            composed.training.control_packet.close()
            group.closing.close()
    return found


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "plain sgd"))],
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (3, 2),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(1, 4, marks=pytest.mark.slow),
    ],
)
def test_every_strategy_goes_on_from_every_other_on_another_number_of_ranks(
    tmp_path: Path, first: int, second: int, optimizer: str
) -> None:
    move(CHOICES, Split(), tmp_path, first=first, second=second, optimizer=optimizer, bound=1e-12)


def move(
    choices: dict[str, dict[str, Any]],
    base: Split,
    folder: Path,
    *,
    first: int,
    second: int,
    optimizer: str,
    bound: float,
) -> None:
    with process_group(device="cpu") as group:
        composed = build(made("ddp", base, optimizer), base, group)
        steps(composed, start=0, end=6)
        reference = content(composed)
        composed.training.control_packet.close()
    run_ranks(saved_by, first, choices, base, str(folder), optimizer, group=False, deadline_s=170)
    for ours in run_ranks(
        gone_on, second, choices, base, str(folder), optimizer, group=False, deadline_s=170
    ):
        assert len(ours) == len(choices) ** 2
        for pair, state in ours.items():
            assert distance(state, reference) <= bound, pair


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 4)])
def test_so_does_every_stage_of_deepspeed(tmp_path: Path, first: int, second: int) -> None:
    """Zero-sized parts, and partitions that end in the middle of a row."""
    move(
        CHOICES | ZERO,
        Split(precision="fp32"),
        tmp_path,
        first=first,
        second=second,
        optimizer="adamw",
        bound=1e-5,
    )


def test_a_run_moves_from_ddp_4_to_fsdp_2_to_zero1_3_to_ddp_1_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    def life(name: str, world_size: int, *args: str, deaths: str = "") -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        return train(
            "--save-every",
            "3",
            *args,
            folder=tmp_path / name,
            recipe=BLOCKY,
            world_size=world_size,
            env={"DEATHS": deaths},
            limit_s=60,
        )

    def losses(name: str) -> list[float]:
        return [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        ]

    stayed = life("stayed", 1)
    assert stayed.codes == [0], stayed.errors
    assert -9 in life("moved", 4, deaths="4:3").codes
    assert -9 in life("moved", 2, "--strategy", "fsdp", "--fsdp.wrap", "Block", deaths="7:1").codes
    assert -9 in life("moved", 3, "--strategy", "zero1", deaths="10:2").codes
    moved = life("moved", 1)
    assert moved.codes == [0], moved.errors
    assert len(losses("moved")) == len(losses("stayed"))
    assert max(abs(a - b) for a, b in zip(losses("moved"), losses("stayed"), strict=True)) <= 1e-9


class Factored(torch.optim.Optimizer):
    """Keeps one number a row of a matrix, and one a column: its state is not shaped like the parameter."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    rows = parameter.grad.reshape(parameter.shape[0], -1).square().mean(1)
                    state["rows"] = state.get("rows", 0) * 0.9 + rows
                    parameter.sub_(group["lr"] * parameter.grad)


@pytest.mark.ranks(2)
def test_state_that_is_not_shaped_like_its_parameter_cannot_go_to_fsdp_and_it_says_so(
    group: Group, tmp_path: Path
) -> None:
    from ddp_kit.errors import ConfigError

    def factored(settings: Split) -> Recipe:
        return recipe(
            settings,
            model=Net,
            loss=classify,
            optimizer=lambda m: Factored([p for p in m.parameters() if p.requires_grad]),
        )

    folder = str(tmp_path / "factored")
    composed = build(factored(Split()), Split(), group)
    steps(composed, start=0, end=1)
    save(composed.training, folder)
    composed.training.checkpoints.finish(failures=1)
    composed.training.control_packet.close()
    fsdp = replace(Split(), strategy="fsdp")
    composed = build(factored(fsdp), fsdp, group)
    steps(composed, start=0, end=1)
    with pytest.raises(
        ConfigError, match=r"/rows has shape .* only what is shaped alike can be split alike"
    ):
        state_of(composed.training)  # or it would save what no later life could read
    composed.training.control_packet.close()
    composed = build(factored(fsdp), fsdp, group)
    before = {name: whole(p).clone() for name, p in composed.training.model.named_parameters()}
    with pytest.raises(
        ConfigError,
        match=r"cannot go on with this --strategy: the optimizer's optimizer/\S+/rows has shape",
    ):
        restore(composed.training, folder)
    assert all(
        torch.equal(before[name], whole(p))
        for name, p in composed.training.model.named_parameters()
    )
    composed.training.control_packet.close()


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        pytest.param("deepspeed 3", marks=needs_deepspeed),
        pytest.param("zero1", marks=pytest.mark.slow),
    ],
)
def test_evaluations_of_the_average_between_steps_change_no_step(group: Group, name: str) -> None:
    """Weights that were gathered for an evaluation are not those of the next step."""

    def norms(settings: Split) -> list[float]:
        composed = build(split(settings), settings, group)
        found = []
        for batch in composed.feed.batches(start=0, end=4):
            found.append(float(train_step(composed.training, batch).grad_norms[""]))
            composed.evaluator(composed.training.model, average=composed.training.average)
        composed.training.control_packet.close()
        group.closing.close()
        return found

    settings = Split(precision="fp32")
    ours = norms(replace(settings, **(CHOICES | ZERO)[name]))
    assert ours == pytest.approx(norms(settings), rel=1e-5)
