"""`--strategy deepspeed`: ZeRO 0 to 3 give ddp's numbers, and its checkpoints are everybody's."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from cases import Settings, classify, normed, plain, recipe, vectors, weighted
from launching import train
from paths import KIT
from torch import nn
from torch.nn.functional import linear

from ddp_kit import LossSum, Recipe
from ddp_kit.checkpoint.best_weights import best_weights
from ddp_kit.checkpoint.checkpointer import About, Checkpointer
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.state_dict import restore_state
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.distributed.collectives import sum_by_name
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, NonFiniteError
from ddp_kit.metrics import tensor_of
from ddp_kit.settings import DeepSpeed
from ddp_kit.setup.build import build
from ddp_kit.testing import run_ranks
from ddp_kit.training.state import Training
from ddp_kit.training.step import train_step

IS_THERE = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not IS_THERE, reason="deepspeed is not installed: pip install 'ddp_kit[deepspeed]'"
)
FAULTY = str(KIT / "faulty.py")
KEEPS_NOTHING = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
CLOSE = 1e-5  # fp32, a small-rate run


def zero(settings: Settings, stage: Any, **fields: Any) -> Settings:
    return replace(settings, strategy="deepspeed", deepspeed=DeepSpeed(stage=stage, **fields))


def adamw(settings: Settings) -> Any:
    """Two groups with different rates, of which one is not decayed."""

    def build(model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        thick = [p for p in trained if p.dim() > 1]
        thin = [p for p in trained if p.dim() == 1]
        return torch.optim.AdamW(
            [
                {"params": thick, "lr": settings.lr},
                {"params": thin, "lr": settings.lr / 2, "weight_decay": 0.0},
            ]
        )

    return build


class Odd(nn.Module):
    """Frozen parameters, one tensor under two names, a weight used outside its module, running statistics, a weight of one number."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 16)
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(16)
        self.scale = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(16, 4)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.norm(self.frozen(inputs)))) * self.scale
        return self.last(self.second(hidden) + linear(hidden, self.first.weight))


@contextmanager
def life(group: Group, made: Recipe, settings: Settings) -> Iterator[tuple[Training, Any]]:
    """One life of a run, with its batches; what the strategy holds is let go of at the end."""
    composed = build(made, settings, group)
    try:
        yield composed.training, composed.feed
    finally:
        composed.training.control_packet.close()
        group.closing.close()


def run(
    training: Training, feed: Any, *, start: int, end: int, norms: list[float] | None = None
) -> list[float]:
    """Returns the losses of steps."""
    group = training.group
    losses = []
    for batch in feed.batches(start=start, end=end):
        sums = train_step(training, batch)
        slots = range(sums.first, sums.first + sums.size)
        own = tensor_of(sums.rows(), ["loss"], device=group.device)
        total, count = sum_by_name(group, own, names=["loss"], order=slots)["loss"]
        losses.append(total / count)
        if norms is not None:
            norms.append(float(sums.grad_norms[""]))
    return losses


def apart(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


# The same numbers


@needs_deepspeed
def test_every_stage_follows_ddp_with_clipping_at_half_the_median_norm_and_ema() -> None:
    """At a small rate, with accumulation that is not even; every parameter has moved after one step."""
    run_ranks(following, 2, 12, group=False)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize("world_size", [2, 4])
def test_every_stage_follows_ddp_for_50_steps(world_size: int) -> None:
    run_ranks(following, world_size, 50, deadline_s=170, group=False)


def following(steps: int) -> None:
    with process_group(device="cpu") as group:
        settings = Settings(precision="fp32", global_batch=25, micro_batch=5, lr=0.01, ema=0.9)
        made = recipe(settings, model=moving)
        norms = list[float]()
        with life(group, made, replace(settings, grad_clip=1e9)) as (training, feed):
            assert len({len(training.plan.of_rank(rank)) for rank in range(group.world_size)}) == 2
            run(training, feed, start=0, end=min(steps, 20), norms=norms)
        settings = replace(settings, grad_clip=median(norms) / 2)
        with life(group, made, settings) as (training, feed):
            losses = run(training, feed, start=0, end=steps)
            averages = averaged(training)
        unclipped = replace(settings, grad_clip=0.0, ema=0.0)
        reference = first_gradient(group, unclipped)
        for stage in (0, 1, 2, 3):
            assert (
                first_gradient(group, zero(unclipped, stage)) - reference
            ).norm() <= 1e-5 * reference.norm(), stage
            with life(group, made, zero(settings, stage)) as (training, feed):
                before = whole_weights(training)
                ours = run(training, feed, start=0, end=1)
                assert all(
                    not torch.equal(now, then)
                    for now, then in zip(whole_weights(training), before, strict=True)
                ), stage
                ours += run(training, feed, start=1, end=steps)
                assert apart(ours, losses) <= CLOSE, stage
                torch.testing.assert_close(averaged(training), averages, rtol=1e-4, atol=1e-5)


def first_gradient(group: Group, settings: Settings) -> torch.Tensor:
    """Returns what a step of rate 1 takes from the weights."""
    made = recipe(
        settings, model=moving, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
    )
    with life(group, made, settings) as (training, feed):
        before = whole_weights(training)
        run(training, feed, start=0, end=1)
        return torch.cat(
            [
                (then - now).flatten()
                for now, then in zip(whole_weights(training), before, strict=True)
            ]
        )


def moving() -> nn.Module:
    """`normed` without the bias that the normalisation takes away again: its gradient is 0."""
    return nn.Sequential(nn.Linear(6, 16, bias=False), *list(normed())[1:])


def averaged(training: Training) -> list[torch.Tensor]:
    assert training.average is not None
    with training.average.applied():
        return whole_weights(training)


def whole_weights(training: Training) -> list[torch.Tensor]:
    return [whole(parameter).clone() for parameter in training.model.parameters()]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ranks(2, deadline_s=170)
def test_every_stage_follows_ddp_in_every_precision_and_with_activations_computed_again(
    group: Group,
) -> None:
    for fields in (
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp32", "activation_checkpointing": "Tanh"},
    ):
        settings = Settings(**({"micro_batch": 5, "lr": 0.01, "grad_clip": 0.3} | fields))
        with life(group, recipe(settings, model=normed), settings) as (training, feed):
            losses = run(training, feed, start=0, end=8)
        for stage in (0, 1, 2, 3):
            with life(group, recipe(settings, model=normed), zero(settings, stage)) as (
                training,
                feed,
            ):
                assert apart(run(training, feed, start=0, end=8), losses) <= (
                    CLOSE if settings.precision == "fp32" else 1e-3
                ), stage


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.ranks(2, deadline_s=170)
def test_a_step_that_overflows_in_fp16_is_left_out_and_the_next_one_is_right(group: Group) -> None:
    settings = Settings(precision="fp16", micro_batch=5, lr=1e-4)
    made = recipe(settings, loss=steep)
    with life(group, made, settings) as (training, feed):
        losses = run(training, feed, start=0, end=8)
        skipped = training.skipped
    assert 0 < skipped < 8
    for stage in (0, 1, 2, 3):
        with life(group, made, zero(settings, stage)) as (training, feed):
            assert apart(run(training, feed, start=0, end=8), losses) <= 1e-3 * losses[0], stage
            assert training.skipped == skipped


def steep(model: nn.Module, batch: Any) -> LossSum:
    """A loss whose gradients overflow in float16 at the first scale."""
    result = classify(model, batch)
    return LossSum(result.total * 100, result.count)


# Checkpoints: the same ones


def saved(
    group: Group, made: Recipe, settings: Settings, storage: LocalDisk, *, start: int, end: int
) -> tuple[list[float], str]:
    """Runs steps from a checkpoint on and saves; returns losses and the weights' hash."""
    with life(group, made, settings) as (training, feed):
        checkpoints = Checkpointer(
            training, storage, about=About(run_id="test"), keep=Keep(metric="loss")
        )
        if start:
            opened = open_checkpoint(storage, start, group=group)
            restore_state(opened, training)
            checkpoints.resumed(opened)
        losses = run(training, feed, start=start, end=end)
        digest = weights_sha256(training.model)
        checkpoints.save({"loss": losses[-1]})
        checkpoints.finish()
        with best_weights(training, storage, keep=Keep(metric="loss")):
            assert (weights_sha256(training.model) == digest) == (training.average is None)
        assert weights_sha256(training.model) == digest
    return losses, digest


@needs_deepspeed
@pytest.mark.parametrize("stages", [(3,), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_a_run_moves_to_deepspeed_and_back_with_its_whole_state(
    tmp_path: Path, stages: tuple[int, ...]
) -> None:
    """ddp for 3 steps, deepspeed for 3 and for 3 more, one process for 3: the losses of a run on ddp that never stopped, and the
    bits of one on deepspeed that never stopped.
    """
    run_ranks(moving_about, 2, str(tmp_path), stages, deadline_s=170, group=False)


@needs_deepspeed
@pytest.mark.slow
def test_a_run_moves_on_four_ranks_too(tmp_path: Path) -> None:
    run_ranks(moving_about, 4, str(tmp_path), (1, 2, 3), deadline_s=170, group=False)


def moving_about(path: str, stages: tuple[int, ...]) -> None:
    with process_group(device="cpu") as group:
        settings = Settings(precision="fp32", micro_batch=3, lr=0.01, grad_clip=0.5, ema=0.9)
        made = recipe(settings, model=Odd, optimizer=adamw(settings))
        losses, _ = saved(group, made, settings, LocalDisk(Path(path) / "whole"), start=0, end=12)
        for stage in stages:
            ours = zero(settings, stage)
            storage = LocalDisk(Path(path) / f"moving-{stage}")
            found, _ = saved(group, made, settings, storage, start=0, end=3)
            found += saved(group, made, ours, storage, start=3, end=6)[0]
            found += saved(group, made, ours, storage, start=6, end=9)[0]
            with process_group(
                topology=Topology(), device="cpu"
            ) as alone:  # each rank by itself, into a folder of its own
                with life(alone, made, settings) as (training, feed):
                    restore_state(open_checkpoint(storage, 9, group=alone), training)
                    found += run(training, feed, start=9, end=12)
            assert apart(found, losses) <= CLOSE, stage
            never_cut = saved(
                group, made, ours, LocalDisk(Path(path) / f"never-{stage}"), start=0, end=6
            )
            cut = LocalDisk(Path(path) / f"cut-{stage}")
            saved(group, made, ours, cut, start=0, end=3)
            again = saved(group, made, ours, cut, start=3, end=6)
            assert (never_cut[0][3:], never_cut[1]) == again, stage


@needs_deepspeed
@pytest.mark.ranks(2, deadline_s=120)
@pytest.mark.parametrize(
    "limits", [{"zero_hpz_partition_size": 2}, pytest.param(KEEPS_NOTHING, marks=pytest.mark.slow)]
)
def test_evaluations_of_the_average_change_no_step_whatever_deepspeed_keeps(
    group: Group, limits: dict[str, int]
) -> None:
    settings = Settings(precision="fp32", lr=0.01, ema=0.5)
    found = []
    with TemporaryDirectory() as folder:
        file = Path(folder, "ds.json")
        file.write_text(json.dumps({"zero_optimization": limits}))
        for own in (settings, zero(settings, 3, config=str(file))):
            made = recipe(own, model=encoder, loss=classify, eval_data=lambda: vectors(50))
            composed = build(made, own, group)
            training = composed.training
            losses = list[float]()
            for step in range(6):
                losses += run(training, composed.feed, start=step, end=step + 1)
                composed.evaluator(training.model, average=training.average)
            training.control_packet.close()
            group.closing.close()
            found.append(losses)
    assert apart(*found) <= CLOSE


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Linear(6, 6), nn.Unflatten(0, (-1, 1)), layer, nn.Flatten(0, 1), nn.Linear(6, 4)
    )


# What is refused


@needs_deepspeed
@pytest.mark.ranks(2, deadline_s=120)
def test_a_step_that_is_not_finite_is_not_applied_and_what_cannot_be_split_is_named(
    group: Group,
) -> None:
    settings = Settings(precision="fp32")
    for stage in (1, 2, 3):
        bad = Bad(group.rank)
        with life(group, recipe(settings, loss=bad), zero(settings, stage)) as (training, feed):
            run(training, feed, start=0, end=2)
            before = weights_sha256(training.model)
            bad.is_on = True
            with pytest.raises(NonFiniteError, match="step 3 is not finite on rank 1"):
                run(training, feed, start=2, end=3)
            assert weights_sha256(training.model) == before
    for stage, message, parts in (
        (
            3,
            "--deepspeed.stage 3: the loss or `evaluate` uses 0.weight outside the forward pass of its module",
            {"loss": weighted},
        ),
        (
            2,
            "has state before the first step",
            {"optimizer": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1)},
        ),
        (1, "cannot split a scalar: give scale the shape", {"model": Scaled}),
    ):
        with (
            pytest.raises(ConfigError, match=message),
            life(group, recipe(settings, **parts), zero(settings, stage)),
        ):
            pass
        group.closing.close()


@needs_deepspeed
@pytest.mark.ranks(2, deadline_s=120)
def test_keys_of_the_configuration_that_deepspeed_does_not_know_are_named_and_those_that_it_knows_are_taken(
    group: Group,
) -> None:
    settings = Settings(precision="fp32")
    with TemporaryDirectory() as folder:
        file = Path(folder, "ds.json")
        file.write_text(
            json.dumps(
                {"zero_optimisation": {"overlap_comm": False}, "steps_per_print": 5, "thresold": 1}
            )
        )
        named = r"'zero_optimisation' \(did you mean 'zero_optimization'\?\), 'thresold'"
        with (
            pytest.raises(ConfigError, match=named),
            life(group, recipe(settings), zero(settings, 2, config=str(file))),
        ):
            pass
        group.closing.close()
        known = {
            "steps_per_print": 5,
            "wall_clock_breakdown": False,
            "communication_data_type": "fp32",
            "flops_profiler": {"enabled": False},
        }
        file.write_text(
            json.dumps(known | {"aio": {"queue_depth": 4}, "comms_logger": {"enabled": False}})
        )
        with life(group, recipe(settings), zero(settings, 2, config=str(file))) as (training, feed):
            run(training, feed, start=0, end=1)


class Bad:
    """A loss that is nan on rank 1 once it is told to."""

    def __init__(self, rank: int):
        self.rank = rank
        self.is_on = False

    def __call__(self, model: nn.Module, batch: Any) -> LossSum:
        result = classify(model, batch)
        if self.is_on and self.rank == 1:
            return LossSum(result.total * float("nan"), result.count)
        return result


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = plain()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs) * self.scale


# The command


@needs_deepspeed
@pytest.mark.slow
def test_the_command_says_no_more_than_with_ddp_and_ends_with_0(tmp_path: Path) -> None:
    ended = train("--strategy", "deepspeed", "--deepspeed.stage", "3", folder=tmp_path, limit_s=90)
    assert ended.codes == [0, 0], ended.errors
    assert ended.errors == ""
    assert "deepspeed" not in "\n".join(ended.outputs).lower()
    assert ended.is_clean()
    assert ended.status["status"] == "finished"


@needs_deepspeed
@pytest.mark.slow
def test_torchrun_ends_with_0_though_no_compiler_is_found(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "-m",
        "ddp_kit.train",
        FAULTY,
    ]
    args = ["--strategy", "deepspeed", "--run-dir", str(tmp_path / "run")]
    bare = {
        "PATH": str(tmp_path),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "built"),
    }  # DeepSpeed compiles operations that it needs, there
    env = {**os.environ, "OMP_NUM_THREADS": "1", **bare}
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=170, env=env)
    assert (done.returncode, done.stderr) == (0, "")
