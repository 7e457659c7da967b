"""What a strategy cannot split is refused before training, by one process as by many, in words that help."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Net, Split, split
from cases import classify
from safetensors.torch import save_file
from torch import nn

import ddp_kit
from ddp_kit.distributed.local_shard import whole
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.errors import ConfigError
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.setup.build import build
from ddp_kit.strategies.checks import require_elementwise, require_separate
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.training.step import train_step

needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed"
)
FSDP = Split(strategy="fsdp", fsdp=Fsdp(wrap=("Block",)))
ZERO = Split(strategy="deepspeed", deepspeed=DeepSpeed(stage=2), precision="fp32")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def stepped_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


class Strided(Net):
    """A parameter that is a transposed view."""

    def __init__(self) -> None:
        super().__init__()
        self.last.weight = nn.Parameter(self.last.weight.detach().t().contiguous().t())


class Scalar(Net):
    """A parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.warmth = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("settings", [FSDP, pytest.param(ZERO, marks=needs_deepspeed)])
def test_one_process_refuses_what_many_would(settings: Split) -> None:
    parts = [
        ddp_kit.Objective(
            loss=classify,
            optimizer=lambda m: torch.optim.SGD(trained(m), lr=0.1),
            trains=f"blocks.{i}",
        )
        for i in (0, 1)
    ]
    with process_group(device="cpu") as group:
        with pytest.raises(
            ConfigError, match=r"cannot split a scalar: give warmth the shape \(1,\)"
        ):
            build(split(settings, model=Scalar), settings, group)
        with pytest.raises(ConfigError, match=r"last\.weight is a view of other strides"):
            build(split(settings, model=Strided), settings, group)
        with pytest.raises(ConfigError, match="trains one objective, the recipe has 2"):
            build(split(settings, loss=None, optimizer=None, objectives=parts), settings, group)
        if settings.strategy == "deepspeed":
            missing = replace(settings, deepspeed=DeepSpeed(config="/nope.json"))
            with pytest.raises(ConfigError, match=r"--deepspeed.config /nope\.json: No such file"):
                build(split(missing), missing, group)


@pytest.mark.ranks(2)
def test_an_optimizer_that_cannot_step_rows_is_named(group: Group) -> None:
    for kind, said in (
        (Sparse, "Sparse cannot step weights that are split"),
        (Reading, "Reading reads numbers off"),
    ):
        made = build(
            split(FSDP, optimizer=lambda model, kind=kind: kind(trained(model), lr=0.01)),
            FSDP,
            group,
        )
        with pytest.raises(ConfigError, match=f"--strategy fsdp: {said}"):
            train_step(made.training, next(made.feed.batches(start=0, end=1)))
        made.training.control_packet.close()
        group.closing.close()


class Sparse(torch.optim.SGD):
    """Steps what is not zero, for which torch has no rule of how it is split."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in stepped_by(self):
            parameter[parameter.grad.nonzero(as_tuple=True)] -= 0.1


class Layerwise(torch.optim.SGD):
    """Divides by the norm of the whole tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in stepped_by(self):
            parameter.sub_(0.1 * parameter.grad * parameter.norm() / parameter.grad.norm())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (torch.optim.SGD, ""),
        (torch.optim.AdamW, ""),
        (torch.optim.RMSprop, ""),
        (Layerwise, "step them otherwise"),
        (torch.optim.Adafactor, "step them otherwise"),
        (torch.optim.LBFGS, "cannot be tried out"),
    ],
)
def test_only_an_optimizer_that_steps_element_by_element_goes_with_deepspeed(
    kind: Any, said: str
) -> None:
    made = kind([nn.Parameter(torch.ones(3, 2))], lr=0.1)
    if not said:
        require_elementwise(made, stage=2)
        return
    with pytest.raises(
        ConfigError, match=f"the optimizer is {kind.__name__}: .*{said}.* Type --strategy zero1"
    ):
        require_elementwise(made, stage=2)
    require_elementwise(made, stage=0)


class Normed(torch.optim.SGD):
    """Divides by the norm of all gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        stepped = stepped_by(self)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in stepped])
        for parameter in stepped:
            parameter.sub_(0.1 * parameter.grad / norm)


class Reading(torch.optim.SGD):
    """Reads a number off each tensor."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in stepped_by(self):
            parameter.sub_(parameter.grad, alpha=0.1 * parameter.norm().item())


def test_what_an_optimizer_takes_over_all_parameters_is_no_part_of_them() -> None:
    parameters = [nn.Parameter(torch.ones(3, 2))]
    with pytest.raises(ConfigError, match=r"the optimizer is Normed: .*Type --strategy zero1"):
        require_elementwise(Normed(parameters, lr=0.1), stage=1)
    with pytest.raises(
        ConfigError, match="--strategy zero1: Normed takes something over all parameters at once"
    ):
        require_separate(Normed(parameters, lr=0.1))
    for kind in (
        torch.optim.SGD,
        torch.optim.AdamW,
        torch.optim.Adafactor,
        Layerwise,
        torch.optim.LBFGS,
    ):
        require_separate(kind(parameters, lr=0.1))


@pytest.mark.ranks(2)
def test_numbers_that_would_be_of_a_part_only_are_refused(group: Group) -> None:
    settings = Split(strategy="zero1")
    with pytest.raises(
        ConfigError, match="--strategy zero1: Normed takes something over all parameters at once"
    ):
        build(
            split(settings, optimizer=lambda model: Normed(trained(model), lr=0.1)), settings, group
        )
    group.closing.close()
    settings = replace(FSDP, ema=0.0)
    made = build(
        split(settings, optimizer=lambda model: Reading(trained(model), lr=0.1)), settings, group
    )
    with pytest.raises(
        ConfigError,
        match="--strategy fsdp: Reading reads numbers off weights or gradients that are split",
    ):
        train_step(made.training, next(made.feed.batches(start=0, end=1)))
    made.training.control_packet.close()
    with pytest.raises(
        ConfigError, match="outside its forward pass, where each rank has its rows only"
    ):
        build(
            split(
                settings,
                evaluate=lambda model, batch: {
                    "l2": (float(model.blocks[0].layer.weight.norm()), 1)
                },
            ),
            settings,
            group,
        )
    group.closing.close()
    if importlib.util.find_spec("deepspeed"):
        settings = replace(ZERO, deepspeed=DeepSpeed(stage=3), ema=0.0)
        with pytest.raises(
            ConfigError, match=r"the loss or `evaluate` uses blocks\.0\.layer\.weight outside"
        ):
            build(split(settings, evaluate=detached), settings, group)


def detached(model: Any, batch: Any) -> dict[str, Any]:
    return {"l2": (model.blocks[0].layer.weight.detach().square().sum(), 1)}


def test_what_is_wrapped_by_size_is_called_and_a_flag_that_wraps_nothing_is_refused() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    assert [
        type(module).__name__
        for module in modules_to_wrap(nn.Sequential(Expert(), Expert()), Fsdp(wrap_size=200))
    ] == ["Expert"] * 2
    for settings in (Fsdp(wrap_size=10**6), Fsdp(wrap=("Tied",))):
        with pytest.raises(ConfigError, match="nothing is left to split by itself"):
            modules_to_wrap(Pair(), settings)
    with pytest.raises(ConfigError, match=r"--fsdp\.wrap ParameterList: it is never called"):
        modules_to_wrap(
            nn.Sequential(nn.ParameterList([torch.ones(2)])), Fsdp(wrap=("ParameterList",))
        )


class Tied(nn.Linear):
    """Shares its weight."""


class Pair(nn.Module):
    """Of which nothing can be split by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Tied(4, 4, bias=False)
        self.second = Tied(4, 4, bias=False)
        self.second.weight = self.first.weight


def test_attentions_own_projection_is_not_wrapped_since_nobody_calls_it() -> None:
    layer = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    found = modules_to_wrap(layer, Fsdp(wrap_size=200))
    assert found
    assert not any(type(module).__name__ == "NonDynamicallyQuantizableLinear" for module in found)


@pytest.mark.ranks(2)
def test_zero1_takes_an_optimizer_of_named_parameters(group: Group) -> None:
    settings = Split(strategy="zero1")
    named = split(
        settings,
        optimizer=lambda model: torch.optim.AdamW(
            (n, p) for n, p in model.named_parameters() if p.requires_grad
        ),
    )
    made = build(named, settings, group)
    before = [parameter.detach().clone() for parameter in trained(made.training.model)]
    train_step(made.training, next(made.feed.batches(start=0, end=1)))
    assert not any(
        torch.equal(now, then)
        for now, then in zip(trained(made.training.model), before, strict=True)
    )
    made.training.control_packet.close()


def reading(model: nn.Module, batch: Any) -> dict[str, Any]:
    """A metric of weights, where each rank may have a part of them."""
    return {"l2": (sum(parameter.square().sum() for parameter in model.parameters()), 1)}


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    "settings",
    [FSDP, pytest.param(replace(ZERO, deepspeed=DeepSpeed(stage=3)), marks=needs_deepspeed)],
)
def test_an_evaluation_that_reads_split_weights_is_refused(group: Group, settings: Split) -> None:
    with pytest.raises(ConfigError, match="the loss or `evaluate` uses"):
        build(split(settings, evaluate=reading), settings, group)


@pytest.mark.ranks(2)
def test_what_a_file_leaves_out_has_first_values_without_memory_too(
    group: Group, tmp_path: Path
) -> None:
    class Holder(nn.Module):
        """Has a buffer that another module has too."""

        def __init__(self, mark: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("mark", mark)

        def reset_parameters(self) -> None:
            self.get_buffer("mark").fill_(2)

    class Drawn(Net):
        def __init__(self) -> None:
            super().__init__()
            mark = torch.zeros(
                2, dtype=torch.float64
            )  # of the run: a conversion would make two of it, with or without memory
            self.one = Holder(mark)
            self.other = Holder(mark)

        def reset_parameters(self) -> None:
            nn.init.ones_(self.scale)

    file = str(tmp_path / f"part-{group.rank}.safetensors")
    frozen = {
        f"frozen.{name}": tensor.double() for name, tensor in Net().frozen.state_dict().items()
    }  # which must be there
    save_file(frozen | {"last.bias": torch.full((4,), 3.0, dtype=torch.float64)}, file)
    settings = replace(
        FSDP, fsdp=Fsdp(wrap=("Block",), meta=True), init_from=file, init_partial=True
    )
    made = build(split(settings, model=Drawn), settings, group)
    weights = {name: whole(parameter) for name, parameter in made.training.model.named_parameters()}
    assert (weights["last.bias"] == 3).all()
    assert not torch.equal(*weights["first.weight"].split(9)), "each rank has rows of its own"
    assert made.training.model.again.weight is made.training.model.first.weight
    one, other = (made.training.model.get_buffer(f"{name}.mark") for name in ("one", "other"))
    assert one is other
    assert one.tolist() == [2, 2]
    assert all(
        float(weights[name].abs().sum()) > 0
        for name in weights
        if name.endswith("weight") or name == "scale"
    )
    made.training.control_packet.close()


@needs_deepspeed
@pytest.mark.parametrize(
    "key",
    ["bfloat16", "zero_optimization.cpu_offload", "zero_optimization.param_persistence_threshold"],
)
def test_old_names_of_what_flags_decide_are_known(tmp_path: Path, key: str) -> None:
    outer, _, inner = key.partition(".")
    (tmp_path / "own.json").write_text(
        json.dumps({outer: {inner: 1} if inner else {"enabled": True}})
    )
    settings = replace(ZERO, deepspeed=DeepSpeed(config=str(tmp_path / "own.json")))
    with (
        process_group(device="cpu") as group,
        pytest.raises(ConfigError, match=rf"{key}: .* decided by"),
    ):
        build(split(settings), settings, group)
