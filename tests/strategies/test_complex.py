"""Complex parameters and buffers keep their imaginary parts, everywhere, or are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, recipe, trace, vectors
from lives import Life, alone, live
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

import ddp_kit
from ddp_kit import LossSum, Recipe
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.cli.ckpt import diff, export
from ddp_kit.data.seeding import Purpose, key
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.errors import ConfigError, NonFiniteError
from ddp_kit.settings import DeepSpeed
from ddp_kit.setup.build import build, build_model
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step

CPU = torch.device("cpu")
SLOW = [pytest.mark.slow, pytest.mark.steady]


class Turned(nn.Module):
    """Turns its inputs by angles, as rotary embeddings do, and mixes them by complex weights, as Fourier operators do."""

    def __init__(self, *, has_weights: bool = True, phase: float = 0.0):
        super().__init__()
        self.register_buffer(
            "turn", torch.polar(torch.ones(6), torch.arange(6.0) + phase), persistent=False
        )
        self.mix = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64)) if has_weights else None
        self.scale = nn.Parameter(torch.tensor(1.0 + 0.5j)) if has_weights else None
        self.head = nn.Linear(12, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        turned = inputs.to(self.turn.dtype) * self.turn
        if self.mix is not None:
            turned = (turned @ self.mix) * self.scale
        return self.head(torch.cat([turned.real, turned.imag], 1))


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.02)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def turned(settings: Settings, **parts: Any) -> Recipe:
    return recipe(settings, **({"model": Turned, "optimizer": adamw} | parts))


def of_bare_torch(
    build: Callable[[nn.Module], Optimizer], samples: list[list[int]], *, grad_clip: float
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns the losses and weights of a plain loop over these samples, in double precision."""
    torch.manual_seed(key(0, Purpose.WEIGHTS))
    model = Turned()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(torch.complex128 if tensor.is_complex() else torch.float64)
    optimizer = build(model)
    inputs, labels = vectors().tensors
    losses = []
    for batch in samples:
        loss = cross_entropy(model(inputs[batch].double()), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.ranks(1, 2)
def test_a_complex_model_trains_as_in_bare_torch(group: Group) -> None:
    settings = Settings(max_steps=8, grad_clip=0.5, micro_batch=6)
    for optimizer in (adamw, sgd):
        for own in (settings, replace(settings, exact=True)):
            ours = trace(group, turned(own, optimizer=optimizer), own)
            losses, state = of_bare_torch(optimizer, ours.samples, grad_clip=0.5)
            assert max(abs(a - b) for a, b in zip(ours.losses, losses, strict=True)) <= 1e-9
            assert {name: tensor.dtype for name, tensor in ours.state.items()} == {
                name: tensor.dtype for name, tensor in state.items()
            }
            assert (
                max(float((ours.state[name] - state[name]).abs().max()) for name in state) <= 1e-9
            )
            assert float(ours.gradient["mix"].imag.abs().max()) > 0


def test_parameters_stay_themselves_and_every_dtype_has_its_own_width() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = Turned()
            self.other = Turned()
            self.other.mix = self.one.mix
            self.one.scale.requires_grad_(False)
            self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
            self.register_buffer("back", torch.polar(torch.ones(2), torch.ones(2)).conj())

    made: list[Tied] = []

    def make() -> Tied:
        made.append(Tied())
        return made[-1]

    for precision in ("fp32", "bf16", "fp16", "fp64"):
        settings = Settings(precision=precision)
        made.clear()
        model: Any = build_model(turned(settings, model=make), settings, alone())
        is_double = precision == "fp64"
        assert model.one.mix is model.other.mix is made[0].one.mix
        assert not model.one.scale.requires_grad
        assert {p.dtype for p in model.parameters()} == (
            {torch.float64, torch.complex128} if is_double else {torch.float32, torch.complex64}
        )
        assert model.one.turn.dtype == (torch.complex128 if is_double else torch.complex64)
        assert model.one.turn.imag.abs().max() > 0
        assert not model.back.is_conj()
        assert model.count.dtype == torch.int64


@pytest.mark.ranks(2)
def test_complex_models_train_in_every_precision(group: Group) -> None:
    losses = {}
    for precision in ("fp32", "bf16", "fp64"):
        settings = Settings(precision=precision, max_steps=5)
        losses[precision] = trace(group, turned(settings), settings).losses
    assert losses["fp32"] == pytest.approx(losses["fp64"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["fp64"], rel=5e-2)


def kept(settings: Settings) -> Recipe:
    return turned(settings, eval_data=lambda: vectors(24))


@pytest.mark.parametrize(
    ("world_size", "precision"),
    [
        (1, "fp64"),
        (2, "fp32"),
        pytest.param(1, "fp32", marks=SLOW),
        pytest.param(2, "fp64", marks=SLOW),
    ],
)
def test_a_complex_run_goes_on_from_its_checkpoint_bit_for_bit(
    precision: Any, world_size: int, tmp_path: Path
) -> None:
    settings = Settings(
        epochs=1,
        max_steps=0,
        micro_batch=6,
        precision=precision,
        ema=0.5,
        run_dir=str(tmp_path / "whole"),
    )
    whole: list[Life] = run_ranks(live, world_size, kept, settings, group=False)
    cut = replace(settings, run_dir=str(tmp_path / "cut"))
    run_ranks(live, world_size, kept, replace(cut, max_steps=4), group=False)
    last: list[Life] = run_ranks(live, world_size, kept, cut, group=False)
    assert last[0].step == 10
    assert all(torch.equal(tensor, last[0].state[name]) for name, tensor in whole[0].state.items())
    one, other = (
        open_checkpoint(LocalDisk(tmp_path / name / "checkpoints"), 10, group=alone())
        for name in ("whole", "cut")
    )
    assert {"ema/mix", "ema/turn", "model/turn", "optimizer/mix/exp_avg"} <= one.kinds.keys()
    assert all(torch.equal(one.tensor(name), other.tensor(name)) for name in one.kinds)
    for name in ("ema/mix", "ema/turn", "optimizer/mix/exp_avg"):
        assert float(one.tensor(name).imag.abs().max()) > 0
    hashes = {
        json.loads((tmp_path / name / "status.json").read_text())["weights_sha256"]
        for name in ("whole", "cut")
    }
    assert len(hashes) == 1


def test_shards_of_complex_weights_are_safetensors_files(tmp_path: Path) -> None:
    for precision, dtype in (("fp32", torch.complex64), ("fp64", torch.float64)):
        run_dir = tmp_path / precision
        life = live(turned, Settings(max_steps=2, precision=precision, run_dir=str(run_dir)))  # type: ignore[arg-type]  # a text, of a loop
        (file,) = run_dir.glob("checkpoints/*/rank-0.safetensors")
        with safe_open(file, framework="pt") as content:
            found = content.get_tensor("model/mix")
            scalar = content.get_tensor("model/scale")
        assert found.dtype == scalar.dtype == dtype
        if dtype == torch.float64:
            found = torch.view_as_complex(found)
            scalar = torch.view_as_complex(scalar)
        assert torch.equal(found, life.state["mix"])
        assert torch.equal(scalar, life.state["scale"])


@pytest.mark.ranks(1)
def test_complex_weights_come_from_files_and_runs_of_either_width(
    group: Group, tmp_path: Path
) -> None:
    mix = torch.randn(6, 6, dtype=torch.complex64)
    model = Turned()
    save_file(model.state_dict() | {"mix": mix}, tmp_path / "weights.safetensors")
    for precision in ("fp32", "fp64"):
        settings = Settings(precision=precision, init_from=str(tmp_path / "weights.safetensors"))
        assert torch.equal(
            build_model(turned(settings), settings, group).mix.to(torch.complex64), mix
        )
    save_file(model.state_dict() | {"mix": mix.real.contiguous()}, tmp_path / "real.safetensors")
    with pytest.raises(ConfigError, match=r"dtype\s+mix"):
        build_model(
            turned(settings), replace(settings, init_from=str(tmp_path / "real.safetensors")), group
        )


def test_ckpt_exports_complex64_refuses_complex128_and_sees_imaginary_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lives = {}
    for name, phase, precision in (("a", 0.0, "fp32"), ("b", 0.1, "fp32"), ("c", 0.0, "fp64")):
        settings = Settings(max_steps=1, precision=precision, run_dir=str(tmp_path / name))  # type: ignore[arg-type]  # a text, of a loop
        lives[name] = live(partial(turned, model=partial(Turned, phase=phase)), settings)
    export(tmp_path / "a", out=tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as content:
        assert torch.equal(content.get_tensor("mix"), lives["a"].state["mix"])
    with pytest.raises(
        ConfigError,
        match=r"mix.* is complex128, for which a safetensors file has no dtype. --init-from takes",
    ):
        export(tmp_path / "c", out=tmp_path / "c.safetensors")
    capsys.readouterr()
    assert diff(tmp_path / "a", tmp_path / "b") == 1
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model/turn")]
    assert "max |a-b| 0.1 " in rows[0]  # the chord of 0.1 rad; its real parts differ by less


def test_the_hash_of_the_weights_sees_complex_buffers() -> None:
    torch.manual_seed(0)
    one = Turned()
    other = Turned(phase=0.1)
    other.load_state_dict(one.state_dict())
    assert weights_sha256(one) != weights_sha256(other)


@pytest.mark.ranks(1, 2)
def test_a_gradient_that_is_not_finite_in_an_imaginary_part_is_not_applied(group: Group) -> None:
    def loss(model: Any, batch: Any) -> LossSum:
        found = classify(model, batch)
        if model.training and made:
            model.mix.register_hook(
                lambda gradient: torch.complex(gradient.real, gradient.imag * float("nan"))
            )
        return found

    made: list[bool] = []
    settings = Settings()
    built = build(turned(settings, loss=loss), settings, group)
    training = built.training
    before = weights_sha256(training.model)
    made.append(True)
    with pytest.raises(
        NonFiniteError, match=r"the gradient of step 1 is not finite though the loss is, in mix"
    ):
        train_step(training, next(built.feed.batches(start=0, end=1)))
    assert weights_sha256(training.model) == before


def exact_hash() -> str:
    """Half of the micro-batches leave one parameter out."""

    def loss(model: Any, batch: Any) -> LossSum:
        found = classify(model, batch)
        if bool(batch[0][0, 0] > 0):
            found.total = found.total + model.spare.abs().sum()
        return found

    class Spare(Turned):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    settings = Settings(
        precision="fp32", max_steps=8, micro_batch=3, exact=True, find_unused_parameters=True
    )
    with process_group(device="cpu", threads=1) as group:
        made = build(turned(settings, model=Spare, loss=loss), settings, group)
        for batch in made.feed.batches(start=0, end=8):
            train_step(made.training, batch)
        made.training.control_packet.close()
        return weights_sha256(made.training.model)


def test_complex_weights_are_exact_at_any_number_of_ranks() -> None:
    hashes = set()
    for world_size in (1, 2, 4):
        hashes |= set(run_ranks(exact_hash, world_size, group=False))
    assert len(hashes) == 1


@pytest.mark.ranks(2)
def test_what_cannot_take_complex_weights_is_refused_by_name(group: Group) -> None:
    for fields in (
        {"strategy": "zero1"},
        {"strategy": "fsdp"},
        {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=0)},
    ):
        settings = replace(Settings(precision="fp32"), **fields)  # type: ignore[arg-type]  # of several types
        with pytest.raises(
            ConfigError,
            match=rf"--strategy {fields['strategy']} .*complex parameters: mix, scale. Type --strategy ddp",
        ):
            build(turned(settings), settings, group)
    settings = Settings(precision="fp32", comm="bf16")
    with pytest.raises(
        ConfigError, match=r"--comm bf16 would send the real parts alone of mix, scale"
    ):
        build(turned(settings), settings, group)


@pytest.mark.ranks(2)
def test_a_loss_that_is_complex_is_refused_before_the_first_step(group: Group) -> None:
    settings = Settings()
    with pytest.raises(
        ddp_kit.errors.DdpKitError,
        match=r"the loss's total is torch.complex128; what is minimised is a real number",
    ):
        build(
            turned(settings, loss=lambda model, batch: LossSum(model.mix.sum(), len(batch[0]))),
            settings,
            group,
        )


@pytest.mark.ranks(2)
def test_every_strategy_leaves_complex_buffers_as_they_are(group: Group) -> None:
    settings = Settings(max_steps=5)
    reference = trace(group, turned(settings, model=partial(Turned, has_weights=False)), settings)
    for strategy in ("zero1", "fsdp"):
        own = replace(settings, strategy=strategy)
        ours = trace(group, turned(own, model=partial(Turned, has_weights=False)), own)
        assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) <= 1e-9


def test_complex_batches_follow_the_precision() -> None:
    values = torch.polar(torch.ones(3), torch.arange(3.0))
    for dtype, expected in ((torch.float64, torch.complex128), (torch.float32, torch.complex64)):
        placed = Placement(CPU, dtype=dtype)((values, values.to(torch.complex128)))
        assert [tensor.dtype for tensor in placed] == [expected, torch.complex128]
        assert torch.equal(placed[0].to(torch.complex64), values)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("deepspeed") is None,
    reason="deepspeed is not installed: pip install 'ddp_kit[deepspeed]'",
)
@pytest.mark.ranks(2)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_leaves_complex_buffers_as_they_are(group: Group, stage: Any) -> None:
    settings = Settings(max_steps=5, precision="fp32", lr=0.01)
    reference = trace(group, turned(settings, model=partial(Turned, has_weights=False)), settings)
    own = replace(settings, strategy="deepspeed", deepspeed=DeepSpeed(stage=stage))
    ours = trace(group, turned(own, model=partial(Turned, has_weights=False)), own)
    assert max(abs(a - b) for a, b in zip(ours.losses, reference.losses, strict=True)) <= 1e-5
