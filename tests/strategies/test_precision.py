"""Precision: what is computed in which dtype, the loss scale of fp16, and clipping by the true norm."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Settings, distance, normed, recipe, trace, vectors
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from ddp_kit import LossSum
from ddp_kit.data.seeding import permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import Built, build, build_model
from ddp_kit.strategies.precision import arithmetic, has_fp16
from ddp_kit.testing import assert_same_on_all_ranks
from ddp_kit.training.state import StepSums
from ddp_kit.training.step import train_step

CPU = torch.device("cpu")


def needs_fp16() -> None:
    if not has_fp16(CPU):
        pytest.skip("torch has no float16 kernels for this CPU")


def steps(made: Built, *, start: int = 0, end: int) -> list[StepSums]:
    return [train_step(made.training, batch) for batch in made.feed.batches(start=start, end=end)]


@contextmanager
def dtypes_seen(model: nn.Module) -> Iterator[set[torch.dtype]]:
    """Notes the dtype of what every linear layer returns."""
    seen: set[torch.dtype] = set()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda *call: seen.add(call[2].dtype)) for layer in layers]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.ranks(1, 2)
def test_the_forward_pass_is_computed_in_the_stated_dtype_and_weights_stay_as_they_are(
    group: Group,
) -> None:
    kinds = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16} | (
        {"fp16": torch.float16} if has_fp16(CPU) else {}
    )
    for precision, dtype in kinds.items():
        settings = Settings(precision=precision, micro_batch=6, max_steps=2)
        made = build(recipe(settings, eval_data=lambda: vectors(10)), settings, group)
        with dtypes_seen(made.training.model) as seen:
            steps(made, end=2)
            made.evaluator(made.training.model)
        assert seen == {dtype}
        kept = torch.float64 if precision == "fp64" else torch.float32
        optimizer = made.training.objectives[0].optimizer
        state: list[Any] = []
        for values in optimizer.state.values():
            state += values.values()
        for tensor in (
            *made.training.model.state_dict().values(),
            *state,
            *(p.grad for p in made.training.model.parameters()),
        ):
            assert tensor.dtype == kept


@pytest.mark.ranks(2)
def test_lower_precision_is_close_to_fp32_and_not_the_same(group: Group) -> None:
    """Bounds: eight bits of mantissa in bf16, eleven in fp16, over five steps at a small rate."""
    full = Settings(precision="fp32", micro_batch=6, max_steps=5, lr=0.02)
    reference = trace(group, recipe(full, model=normed), full)
    for precision, gradient, losses in (
        ("bf16", 3e-2, 1e-2),
        *([("fp16", 4e-3, 1e-3)] if has_fp16(CPU) else []),
    ):
        settings = replace(full, precision=precision)
        ours = trace(group, recipe(settings, model=normed), settings)
        assert 0 < distance(ours.gradient, reference.gradient) <= gradient
        assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) <= losses


def whole_batch_norm(settings: Settings, group: Group, *, dtype: torch.dtype) -> float:
    """Returns the norm that torch's own clipping finds in the gradient of the whole first global batch."""
    model = build_model(recipe(settings), settings, group).to(dtype)
    inputs, labels = vectors().tensors
    order = permutation(settings.seed, 0, 240)[: settings.global_batch]
    cross_entropy(model(inputs[order].to(dtype)), labels[order]).backward()
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip))


@pytest.mark.ranks(1, 3)
def test_clipping_is_by_the_global_norm_of_the_whole_batch_after_unscaling(group: Group) -> None:
    bounds = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 3e-2} | ({"fp16": 4e-3} if has_fp16(CPU) else {})
    for precision, bound in bounds.items():
        settings = Settings(precision=precision, micro_batch=5, grad_clip=0.05, momentum=0.0)
        made = build(recipe(settings), settings, group)
        before = [p.detach().clone() for p in made.training.model.parameters()]
        sums = steps(made, end=1)[0]
        assert float(sums.grad_norms[""]) == pytest.approx(
            whole_batch_norm(settings, group, dtype=torch.float64), rel=bound
        )
        moved = torch.cat(
            [
                (p.detach() - q).flatten()
                for p, q in zip(made.training.model.parameters(), before, strict=True)
            ]
        )
        assert float(moved.norm()) == pytest.approx(
            settings.lr * settings.grad_clip, rel=1e-4
        )  # torch adds 1e-6 to the norm


def gained(model: nn.Module, batch: Any) -> LossSum:
    """A loss with a factor for each sample."""
    inputs, labels, gains = batch
    return LossSum(
        (cross_entropy(model(inputs), labels, reduction="none") * gains).sum(), len(labels)
    )


def with_gain(gain: float, *, position: int = -1) -> TensorDataset:
    """Returns data with a gain for all samples, or for the one at `position` of the first epoch."""
    inputs, labels = vectors().tensors
    gains = torch.full((240,), gain)
    if position >= 0:
        gains = torch.ones(240)
        gains[permutation(0, 0, 240)[position]] = gain
    return TensorDataset(inputs, labels, gains)


@pytest.mark.ranks(1, 3)
def test_an_fp16_overflow_on_one_rank_is_skipped_on_all_and_counted(group: Group) -> None:
    """Warnings are errors here, torch's own about a scheduler stepped before its optimizer among them."""
    needs_fp16()
    settings = Settings(precision="fp16", micro_batch=4, max_steps=9, ema=0.5)
    parts: dict[str, Any] = {
        "loss": gained,
        "train_data": lambda: with_gain(1e4, position=23),
    }  # of the last rank, in the first step
    parts["scheduler"] = lambda optimizer, total: LambdaLR(optimizer, lambda step: 1 / (step + 1))
    made = build(recipe(settings, model=normed, **parts), settings, group)
    training = made.training
    objective = made.training.objectives[0]
    objective.scale.growth_interval = 3
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    steps(made, end=1)
    assert (training.step, training.skipped) == (1, 1)
    for name, tensor in training.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not objective.optimizer.state
    assert objective.scheduler.last_epoch == 1
    assert objective.scale.scale == 2.0**15
    scales = []
    for step in range(1, 9):
        steps(made, start=step, end=step + 1)
        scales.append(objective.scale.scale)
    assert scales == [2.0**15] * 2 + [2.0**16] * 3 + [2.0**17] * 3
    assert (training.step, training.skipped, objective.scheduler.last_epoch) == (9, 1, 9)
    assert objective.optimizer.param_groups[0]["lr"] == pytest.approx(settings.lr / 10)
    assert_same_on_all_ranks(
        {"weights": training.model.state_dict(), "scale": objective.scale.scale}, group
    )


@pytest.mark.ranks(2)
def test_scaling_keeps_gradients_that_fp16_could_not_hold(group: Group) -> None:
    needs_fp16()
    settings = Settings(precision="fp16", max_steps=1)
    gradients = []
    for precision in ("fp32", "fp16"):
        chosen = replace(settings, precision=precision)
        ours = trace(group, recipe(chosen, loss=gained, train_data=lambda: with_gain(2e-6)), chosen)
        gradients.append(ours.gradient)
    assert distance(gradients[1], gradients[0]) <= 1e-2


@pytest.mark.ranks(2)
def test_a_loss_that_is_not_finite_in_fp16_is_no_overflow(group: Group) -> None:
    from ddp_kit.errors import NonFiniteError

    needs_fp16()
    settings = Settings(precision="fp16")
    made = build(
        recipe(settings, loss=gained, train_data=lambda: with_gain(torch.inf, position=23)),
        settings,
        group,
    )
    with pytest.raises(NonFiniteError, match="loss of step 1 is not finite on rank 1"):
        steps(made, end=1)


@pytest.mark.ranks(1)
def test_a_precision_that_the_device_cannot_run_is_refused_with_one_that_it_can(
    monkeypatch: pytest.MonkeyPatch, group: Group
) -> None:
    monkeypatch.setattr("ddp_kit.strategies.precision.has_fp16", lambda device: False)
    for precision, message in (
        ("tf32", "needs a CUDA device.*--precision fp32"),
        ("fp16", "no float16 kernels.*--precision bf16"),
    ):
        with pytest.raises(ConfigError, match=message), arithmetic(precision, CPU):
            pass
    with pytest.raises(ConfigError, match=r"--sync-batchnorm.*CUDA only"):
        build(
            recipe(Settings(sync_batchnorm=True), model=normed),
            Settings(sync_batchnorm=True),
            group,
        )


@pytest.mark.slow
@pytest.mark.ranks(2, deadline_s=300)
def test_a_compiled_model_gives_the_numbers_and_names_of_the_plain_one(group: Group) -> None:
    plainly, compiled = (Settings(micro_batch=6, compile=is_on) for is_on in (False, True))
    one, two = (
        trace(group, recipe(settings, eval_data=lambda: vectors(10)), settings)
        for settings in (plainly, compiled)
    )
    assert one.state.keys() == two.state.keys()
    assert distance(two.state, one.state) <= 1e-10
    assert two.losses == pytest.approx(one.losses, abs=1e-10)
