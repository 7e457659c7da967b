"""A rank that uses the model as the others do not is found before weights or gradients of different modules are mixed up."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Block, Net, Split, split
from cases import trace
from launching import train
from paths import KIT
from torch.utils.checkpoint import checkpoint

from ddp_kit.distributed.process_group import Group
from ddp_kit.settings import DeepSpeed, Fsdp

UNEVEN = str(KIT / "uneven.py")
FSDP = ("--strategy", "fsdp", "--fsdp.wrap", "Block")
ZERO = ("--strategy", "deepspeed", "--deepspeed.stage")
needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed"
)
needs_zeros = pytest.mark.skipif(
    not hasattr(
        __import__("torch.distributed.fsdp", fromlist=["FSDPModule"]).FSDPModule,
        "set_reduce_scatter_unused_params",
    ),
    reason="before torch 2.15 the sum itself may fail first",
)
NO_GRADIENT = "blocks.1.b.bias, blocks.1.b.weight got no gradient, and the other ranks would wait for it. If the loss leaves"
BOTH = [
    (
        FSDP,
        "skip",
        "blocks.2 was called where blocks.1 was before the first step. Ranks gather weights at each call",
    ),
    (
        FSDP,
        "detach",
        "blocks.0.a.bias, blocks.0.a.weight, blocks.0.b.bias, blocks.0.b.weight, blocks.1.a.bias and 3 more got no gradient",
    ),
    pytest.param(FSDP, "part", NO_GRADIENT, marks=needs_zeros),
    pytest.param(
        (*ZERO, "1"),
        "swap",
        "blocks.1.b.bias got its gradient where blocks.2.b.bias did",
        marks=needs_deepspeed,
    ),
]
REST = [
    (FSDP, "swap", "blocks.2 was called where blocks.1 was before the first step"),
    (FSDP, "end early", "blocks.3 was not called, as it was before the first step"),
    *((("--strategy", "fsdp"), fault, "") for fault in ("part", "skip")),
    *(pytest.param((*ZERO, stage), "part", NO_GRADIENT, marks=needs_deepspeed) for stage in "12"),
    pytest.param(
        (*ZERO, "2"),
        "swap",
        "blocks.1.b.bias got its gradient where blocks.2.b.bias did",
        marks=needs_deepspeed,
    ),
    pytest.param(
        (*ZERO, "3"),
        "part",
        "blocks.2.a was called where blocks.1.b was before the first step",
        marks=needs_deepspeed,
    ),
    pytest.param(
        (*ZERO, "3"),
        "cut",
        "blocks.0.a.bias, blocks.0.a.weight, blocks.0.b.bias",
        marks=needs_deepspeed,
    ),
    pytest.param(
        (*ZERO, "3"),
        "skip",
        "blocks.2.a was called where blocks.1.a was before the first step",
        marks=needs_deepspeed,
    ),
]


def found(args: tuple[str, ...], fault: str, words: str, *, folder: Path) -> None:
    ended = train("--fault", fault, "--at-rank", "1", *args, recipe=UNEVEN, folder=folder)
    assert ended.codes == [1, 1]
    assert ended.errors.startswith(words or "blocks.1."), ended.errors
    assert "--strategy zero1" in ended.errors.splitlines()[0]
    assert (ended.status["status"], ended.status["step"]) == ("failed", 3)
    assert ended.is_clean()


@pytest.mark.parametrize(("args", "fault", "words"), BOTH)
def test_a_rank_that_departs_from_its_dry_run_is_named_and_takes_no_step(
    args: Any, fault: str, words: str, tmp_path: Path
) -> None:
    found(args, fault, words, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("args", "fault", "words"), REST)
def test_so_it_is_with_every_departure(args: Any, fault: str, words: str, tmp_path: Path) -> None:
    found(args, fault, words, folder=tmp_path)


class Recomputed(Net):
    """Calls its blocks once more in backward."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs) + self.again(inputs.square())
        for block in self.blocks:
            assert isinstance(block, Block)
            hidden = checkpoint(block, hidden, use_reentrant=False)
        logits: torch.Tensor = self.last(hidden + self.frozen(hidden)) * self.scale
        return logits


CHOICES = [
    ({"strategy": "fsdp", "fsdp": Fsdp(wrap=("Block",))}, 1e-9),
    *(
        pytest.param(
            {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=stage)},
            1e-5,
            marks=needs_deepspeed,
        )
        for stage in (3,)
    ),
]


@pytest.mark.ranks(2)
@pytest.mark.parametrize(("choice", "bound"), CHOICES)
def test_activation_checkpointing_departs_from_nothing(
    group: Group, choice: dict[str, Any], bound: float
) -> None:
    settings = Split(max_steps=5, micro_batch=6, precision="fp32" if bound > 1e-9 else "fp64")
    ours = trace(group, split(settings, model=Recomputed), replace(settings, **choice))
    reference = trace(group, split(settings), settings)
    assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) <= bound
