"""zero1, fsdp and compressed gradients follow ddp; what cannot be is refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Net, Split, averages, half_the_median_norm, split
from cases import Trace, classify, distance, normed, recipe, trace, vectors, weighted
from launching import train
from paths import KIT
from torch import nn

import ddp_kit
from ddp_kit.checkpoint.own_loop import save
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.config.validation import check
from ddp_kit.distributed.local_shard import is_split, local, whole
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import ConfigError, NonFiniteError
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.setup.build import build
from ddp_kit.setup.meta_init import materialise
from ddp_kit.strategies.fsdp import modules_to_wrap
from ddp_kit.testing import run_ranks
from ddp_kit.training.evaluation_sets import data_sets
from ddp_kit.training.step import train_step

MORTAL = str(KIT / "mortal.py")
SLOW = [pytest.mark.slow, pytest.mark.steady]
WRAPPED = Fsdp(wrap=("Block",))
OTHERS: list[dict[str, Any]] = [
    {"strategy": "zero1"},
    {"strategy": "fsdp"},
    {"strategy": "fsdp", "fsdp": WRAPPED},
]


def apart(a: Trace, b: Trace) -> float:
    """Returns the largest difference of two runs' losses."""
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def follow_ddp(group: Group, *, steps: int) -> None:
    """Asserts that all strategies give ddp's numbers, clipped at half the median norm."""
    settings = Split(max_steps=steps)
    settings = replace(settings, grad_clip=half_the_median_norm(group, settings))
    reference = trace(group, split(settings), settings)
    for choice in OTHERS:
        ours = trace(group, split(settings), replace(settings, **choice))
        assert distance(ours.gradient, reference.gradient) <= 1e-12, choice
        assert apart(ours, reference) <= 1e-9
        assert distance(ours.state, reference.state) <= 1e-9
        assert ours.samples == reference.samples


@pytest.mark.ranks(4)
def test_zero1_and_fsdp_follow_ddp_clipped_at_half_the_median_norm(group: Group) -> None:
    """On 4 ranks the parts of a weight are uneven."""
    follow_ddp(group, steps=8)


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.ranks(2, 4)
def test_zero1_and_fsdp_follow_ddp_for_50_steps(group: Group) -> None:
    follow_ddp(group, steps=50)


@pytest.mark.ranks(3)
def test_micro_batches_that_do_not_come_out_even_change_nothing(group: Group) -> None:
    """24 / 3 = 8 micro-batches: on 3 ranks 3 + 3 + 2, so that a rank gathers weights once more than it has work."""
    for loss in (classify, weighted):
        settings = Split(micro_batch=3, max_steps=3)
        reference = trace(group, split(settings, loss=loss), settings)
        # The other loss uses blocks' weights outside the blocks.
        for choice in OTHERS if loss is classify else OTHERS[:2]:
            ours = trace(group, split(settings, loss=loss), replace(settings, **choice))
            assert distance(ours.gradient, reference.gradient) <= 1e-12
            assert apart(ours, reference) <= 1e-9


@pytest.mark.ranks(2)
def test_layers_that_share_a_weight_are_wrapped_and_share_it_still(group: Group) -> None:
    """FSDP2 would split the one tensor twice."""
    settings = Split(max_steps=4)
    reference = trace(group, split(settings), settings)
    ours = trace(
        group, split(settings), replace(settings, strategy="fsdp", fsdp=Fsdp(wrap=("Linear",)))
    )
    assert apart(ours, reference) <= 1e-9
    assert ours.state.keys() == reference.state.keys()


@pytest.mark.ranks(2)
def test_after_one_step_every_parameter_has_moved_and_so_has_the_average(group: Group) -> None:
    """An optimizer that was built before the model was split would step tensors that nobody reads."""
    for choice in OTHERS:
        settings = Split(max_steps=1, grad_clip=0.0, **choice)
        made = build(split(settings), settings, group)
        before = {name: whole(p).clone() for name, p in made.training.model.named_parameters()}
        train_step(made.training, next(made.feed.batches(start=0, end=1)))
        after = {name: whole(p).clone() for name, p in made.training.model.named_parameters()}
        still = [name for name in before if bool((before[name] == after[name]).any())]
        assert sorted(still) == ["frozen.bias", "frozen.weight"]
        average = averages(made.training)
        assert all(
            torch.allclose(average[name], 0.9 * before[name] + 0.1 * after[name], atol=1e-12)
            for name in before
        )
        assert {name: whole(p).tolist() for name, p in made.training.model.named_parameters()} == {
            n: t.tolist() for n, t in after.items()
        }
        made.training.control_packet.close()


@pytest.mark.ranks(4)
def test_a_rank_keeps_its_part_only(group: Group) -> None:
    """zero1 and fsdp are for memory: the optimizer's state, and with fsdp weights and gradients, are split."""
    for choice in OTHERS:
        settings = Split(**choice)
        made = build(split(settings, model=lambda: Net(64)), settings, group)
        train_step(made.training, next(made.feed.batches(start=0, end=1)))
        parameters = list(made.training.model.parameters())
        full = sum(p.numel() * 8 for p in parameters if p.requires_grad)
        state = made.training.objectives[0].optimizer.state
        moments = 0
        for own in state.values():
            moments += sum(local(value).nbytes for value in own.values())
        # Whole parameters do not come out even.
        allowed = 2 * full / group.world_size * 1.35 + 8 * len(parameters)
        assert moments <= allowed
        held = sum(local(p).nbytes for p in parameters)
        assert all(is_split(p) for p in parameters) == (choice["strategy"] == "fsdp")
        if choice["strategy"] == "fsdp":
            assert held <= sum(
                p.numel() * 8 for p in parameters
            ) / group.world_size * 1.05 + 8 * len(parameters)
        made.training.control_packet.close()


@pytest.mark.ranks(2)
def test_in_fp32_they_follow_ddp_at_a_small_rate(group: Group) -> None:
    settings = Split(precision="fp32", lr=1e-4, max_steps=8)
    reference = trace(group, split(settings), settings)
    for choice in OTHERS:
        ours = trace(group, split(settings), replace(settings, **choice))
        assert distance(ours.gradient, reference.gradient) <= 1e-5
        assert apart(ours, reference) <= 1e-5


@pytest.mark.ranks(2)
def test_bf16_and_compressed_gradients_stay_within_stated_bounds(group: Group) -> None:
    """bfloat16 has 8 bits: a rounded gradient is off by 2^-9 of each element, so by at most 2^-9 in norm; with fp16 by 2^-12."""
    settings = Split(precision="fp32", lr=1e-3, ema=0.0, grad_clip=0.0, max_steps=8)
    reference = trace(group, split(settings), settings)
    for comm, bound in (("bf16", 2.0**-8), ("fp16", 2.0**-11)):
        ours = trace(group, split(settings), replace(settings, comm=comm))
        assert 0 < distance(ours.gradient, reference.gradient) <= bound
        assert apart(ours, reference) <= bound
        sharded = trace(group, split(settings), replace(settings, comm=comm, strategy="zero1"))
        assert sharded.losses == ours.losses
    lower = replace(settings, precision="bf16")
    reference = trace(group, split(lower), lower)
    for choice in OTHERS:
        ours = trace(group, split(lower), replace(lower, **choice))
        assert distance(ours.gradient, reference.gradient) <= 0.1
        assert apart(ours, reference) <= 0.05


@pytest.mark.ranks(3)
def test_running_statistics_and_draws_are_ddps(group: Group) -> None:
    settings = Split(micro_batch=3, max_steps=8, ema=0.0)
    for precision in ("fp64", "bf16"):
        own = replace(settings, precision=precision)
        reference = trace(group, recipe(own, model=normed), own)
        for choice in OTHERS[:2]:
            ours = trace(group, recipe(own, model=normed), replace(own, **choice))
            assert apart(ours, reference) <= (1e-9 if precision == "fp64" else 0.05)
            assert distance(ours.state, reference.state) <= (1e-9 if precision == "fp64" else 0.05)


@pytest.mark.ranks(3)
def test_evaluation_is_ddps_also_where_a_rank_has_no_samples(group: Group) -> None:
    for size in (1, 50):
        found = []
        for choice in [{}, *OTHERS]:
            settings = Split(max_steps=3, **choice)
            made = build(split(settings), settings, group)
            for batch in made.feed.batches(start=0, end=3):
                train_step(made.training, batch)
            evaluator = made.evaluator.on(data_sets(vectors(size), what="evaluation"))
            digest = weights_sha256(made.training.model)
            found.append(evaluator(made.training.model, average=made.training.average)["loss"])
            assert weights_sha256(made.training.model) == digest
            train_step(made.training, next(made.feed.batches(start=3, end=4)))
            made.training.control_packet.close()
        assert max(found) - min(found) <= 1e-9


@pytest.mark.ranks(2)
def test_a_step_that_is_not_finite_leaves_weights_and_names_the_sample(group: Group) -> None:
    bad = vectors()
    bad.tensors[0][17] = torch.inf
    for choice in OTHERS:
        settings = Split(max_steps=10, **choice)
        made = build(split(settings, train_data=lambda: ddp_kit.Data(bad)), settings, group)
        digest = weights_sha256(made.training.model)
        with pytest.raises(NonFiniteError, match="17"):
            for batch in made.feed.batches(start=0, end=10):
                digest = weights_sha256(made.training.model)
                train_step(made.training, batch)
        assert weights_sha256(made.training.model) == digest
        made.training.control_packet.close()


@pytest.mark.ranks(2)
def test_a_gradient_that_is_not_finite_on_one_ranks_rows_is_named_on_all(group: Group) -> None:
    """The square root's derivative at 0: one row of one tensor, which one rank holds."""

    def loss(model: Any, batch: Any) -> ddp_kit.LossSum:
        found = classify(model, batch)
        return ddp_kit.LossSum(
            found.total + (model.blocks[1].layer.weight[0, 0] * 0).sqrt(), found.count
        )

    settings = Split(strategy="fsdp")
    made = build(recipe(settings, model=Net, loss=loss), settings, group)
    digest = weights_sha256(made.training.model)
    with pytest.raises(NonFiniteError, match=r"blocks\.1\.layer\.weight"):
        train_step(made.training, next(made.feed.batches(start=0, end=1)))
    assert weights_sha256(made.training.model) == digest
    made.training.control_packet.close()


def test_what_is_wrapped_is_found_by_class_and_by_size() -> None:
    model = Net(8)
    assert [type(m).__name__ for m in modules_to_wrap(model, Fsdp(wrap=("Block", "Linear")))].count(
        "Block"
    ) == 3
    assert modules_to_wrap(model, Fsdp(wrap_size=80)) == list(reversed(model.blocks))
    tied = [
        name
        for name, module in model.named_modules()
        if module in modules_to_wrap(model, Fsdp(wrap=("Linear",)))
    ]
    assert sorted(tied) == ["blocks.0.layer", "blocks.1.layer", "blocks.2.layer", "frozen", "last"]
    twice = nn.Sequential(model.blocks[0], nn.Linear(8, 8), model.blocks[0])
    assert modules_to_wrap(twice, Fsdp(wrap=("Block",))) == [model.blocks[0]]
    with pytest.raises(
        ConfigError,
        match=r"--fsdp.wrap Blok: the model has no module of that class. Did you mean Block\?",
    ):
        modules_to_wrap(model, Fsdp(wrap=("Blok",)))
    with pytest.raises(ConfigError, match=r"--fsdp.wrap ModuleList: it is never called itself"):
        modules_to_wrap(model, Fsdp(wrap=("ModuleList",)))
    settings = Split(strategy="fsdp", fsdp=Fsdp(wrap=("Blok",)))
    with (
        process_group(device="cpu") as group,
        pytest.raises(ConfigError, match=r"Did you mean Block\?"),
    ):
        build(split(settings), settings, group)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"exact": True, "micro_batch": 3, "strategy": "zero1"}, "--exact with --strategy zero1"),
        ({"exact": True, "micro_batch": 3, "strategy": "fsdp"}, "--exact with --strategy fsdp"),
        (
            {"exact": True, "micro_batch": 3, "strategy": "deepspeed"},
            "--exact with --strategy deepspeed",
        ),
        ({"exact": True, "micro_batch": 3, "comm": "bf16"}, "--comm bf16 with --exact"),
        ({"strategy": "fsdp", "comm": "fp16"}, "--comm fp16 with --strategy fsdp"),
        ({"fsdp": Fsdp(hybrid=True)}, r"--fsdp.\* is set without --strategy fsdp"),
        (
            {"strategy": "fsdp", "precision": "fp16", "fsdp": Fsdp(cpu_offload=True)},
            "--fsdp.cpu-offload with --precision fp16",
        ),
        (
            {"strategy": "fsdp", "fsdp": Fsdp(cpu_offload=True, hybrid=True)},
            "--fsdp.cpu-offload with --fsdp.hybrid",
        ),
        (
            {"strategy": "fsdp", "find_unused_parameters": True},
            "--strategy fsdp with --find-unused-parameters",
        ),
        ({"strategy": "fsdp", "micro_batch": "auto"}, "--strategy fsdp with --micro-batch auto"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check(Split(**given))


@pytest.mark.ranks(2)
def test_zero1_follows_ddp_where_two_objectives_train_the_same_weights(group: Group) -> None:
    def sgd(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        )

    parts = [ddp_kit.Objective(loss=classify, optimizer=sgd, trains=name) for name in ("", "last")]
    found = []
    for choice in ({}, {"strategy": "zero1"}):
        settings = Split(max_steps=5, **choice)
        made = build(split(settings, loss=None, optimizer=None, objectives=parts), settings, group)
        for batch in made.feed.batches(start=0, end=5):
            train_step(made.training, batch)
        found.append(
            {name: tensor.clone() for name, tensor in made.training.model.state_dict().items()}
        )
        made.training.control_packet.close()
    assert distance(*found) <= 1e-12


@pytest.mark.ranks(2)
def test_hooks_of_the_recipes_optimizer_are_called_under_zero1(group: Group) -> None:
    seen: list[str] = []

    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        made = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        made.register_step_pre_hook(lambda *_: seen.append("before"))
        made.register_step_post_hook(lambda *_: seen.append("after"))
        return made

    settings = Split(strategy="zero1")
    made = build(split(settings, optimizer=sgd), settings, group)
    for batch in made.feed.batches(start=0, end=2):
        train_step(made.training, batch)
    assert seen == ["before", "after"] * 2
    made.training.control_packet.close()


def reading(model: nn.Module, batch: Any) -> ddp_kit.LossSum:
    """A loss whose own term never meets a plain tensor that has a dimension."""
    result = classify(model, batch)
    return replace(
        result,
        total=result.total + sum(parameter.square().sum() for parameter in model.parameters()),
    )


@pytest.mark.ranks(2)
def test_scalars_several_objectives_and_odd_optimizers_are_refused_by_name(group: Group) -> None:
    class Scalar(Net):
        def __init__(self) -> None:
            super().__init__()
            self.warmth = nn.Parameter(torch.tensor(1.0))

    class Odd(torch.optim.SGD):
        def __init__(self, parameters: Any, *, must: str) -> None:
            assert must
            super().__init__(parameters, lr=0.1)

    fsdp = Split(strategy="fsdp")
    zero1 = Split(strategy="zero1")
    with pytest.raises(ConfigError, match=r"cannot split a scalar: give warmth the shape \(1,\)"):
        build(split(fsdp, model=Scalar), fsdp, group)
    wrapped = Split(strategy="fsdp", fsdp=WRAPPED)
    for loss in (weighted, reading):
        with pytest.raises(
            ConfigError, match="the loss or `evaluate` uses weights of a wrapped module outside"
        ):
            build(split(wrapped, loss=loss), wrapped, group)
    with pytest.raises(ConfigError, match="cannot build Odd"):
        build(
            split(
                zero1,
                optimizer=lambda model: Odd(
                    [p for p in model.parameters() if p.requires_grad], must="x"
                ),
            ),
            zero1,
            group,
        )

    class Every(torch.optim.SGD):
        def __init__(self, parameters: Any, *, every: int = 1) -> None:
            self.every = every
            super().__init__(parameters, lr=0.1)

    with pytest.raises(ConfigError, match=r"built again .* every would not be 3"):
        build(
            split(
                zero1,
                optimizer=lambda model: Every(
                    [p for p in model.parameters() if p.requires_grad], every=3
                ),
            ),
            zero1,
            group,
        )
    deepspeed = Split(strategy="deepspeed", deepspeed=DeepSpeed(stage=0))
    parts = [
        ddp_kit.Objective(
            loss=classify,
            optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
            trains=f"blocks.{i}",
        )
        for i in (0, 1)
    ]
    with pytest.raises(ConfigError, match="it trains one objective, the recipe has 2"):
        build(split(fsdp, loss=None, optimizer=None, objectives=parts), fsdp, group)
    with pytest.raises(
        ConfigError, match="--strategy deepspeed: it trains one objective, the recipe has 2"
    ):
        build(split(deepspeed, loss=None, optimizer=None, objectives=parts), deepspeed, group)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("zero1", marks=SLOW)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, strategy: str) -> None:
    args = ["--epochs", "1", "--save-every", "3", "--strategy", strategy, "--width", "32"]

    def run(name: str, deaths: str = "") -> Any:
        (tmp_path / name).mkdir(exist_ok=True)
        return train(
            *args,
            folder=tmp_path / name,
            recipe=MORTAL,
            world_size=2,
            env={"DEATHS": deaths},
            limit_s=60,
        )

    whole_run = run("whole")
    assert whole_run.codes == [0, 0], whole_run.errors
    assert -9 in run("cut", "8:1").codes
    last = run("cut")
    assert last.codes == [0, 0], last.errors
    assert last.status["weights_sha256"] == whole_run.status["weights_sha256"]
    assert last.status["metrics"] == whole_run.status["metrics"]


class Drawn(Net):
    """Its own parameter has first values too."""

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


def hybrid_and_meta(folder: str) -> tuple[float, float, bool]:
    """4 ranks as 2 nodes of 2: split within a node, repeated across; and a model that had no memory before it was split."""
    topology = replace(
        read_topology(), nodes=2, local_world_size=2, local_rank=read_topology().rank % 2
    )
    with process_group(topology=topology, device="cpu") as group:
        settings = Split(max_steps=3)
        reference = trace(group, split(settings), settings)
        hybrid = replace(settings, strategy="fsdp", fsdp=Fsdp(wrap=("Block",), hybrid=True))
        ours = trace(group, split(hybrid), hybrid)
        made = build(split(hybrid), hybrid, group)
        assert all(
            local(p).shape[0] <= -(-p.shape[0] // 2) for p in made.training.model.parameters()
        )
        save(made.training, folder)
        made.training.checkpoints.finish(failures=1)
        made.training.control_packet.close()
        meta = replace(hybrid, fsdp=replace(hybrid.fsdp, meta=True, hybrid=False), init_from=folder)
        from_file = trace(group, split(meta), meta)
        made = build(
            split(replace(meta, init_from=""), model=Drawn), replace(meta, init_from=""), group
        )
        drawn = {name: whole(p) for name, p in made.training.model.named_parameters()}
        is_drawn = (
            all(bool(tensor.isfinite().all()) for tensor in drawn.values())
            and float(drawn["last.weight"].std()) > 0.05
        )
        is_tied = made.training.model.first.weight is made.training.model.again.weight
        for batch in made.feed.batches(start=0, end=2):
            train_step(made.training, batch)
        made.training.control_packet.close()
        return apart(ours, reference), apart(from_file, reference), is_drawn and is_tied


def test_hybrid_sharding_and_a_model_without_memory_follow_ddp(tmp_path: Path) -> None:
    for hybrid, from_file, is_drawn in run_ranks(
        hybrid_and_meta, 4, str(tmp_path / "a"), group=False
    ):
        assert hybrid <= 1e-9
        assert from_file <= 1e-9
        assert is_drawn
    with pytest.raises(
        ConfigError, match=r"--fsdp.meta: scale have tensors|--fsdp.meta: Net have tensors"
    ):
        materialise(Net(8).to("meta"), device=torch.device("cpu"), seed=0, reads="nothing")


class Turned(nn.Module):
    """Angles that no file holds."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.forgets = forgets
        self.register_buffer("angles", torch.empty(3), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if not self.forgets:
            self.angles = torch.arange(3.0)


def test_a_model_without_memory_has_its_buffers_values_or_says_so() -> None:
    """Rotary embeddings, masks: with a file of weights they would stay 0."""

    def made(forgets: bool) -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(3, 3), Turned(forgets=forgets))

    for reads in ("nothing", "file"):
        model = made(False)
        materialise(model, device=torch.device("cpu"), seed=0, reads=reads)
        assert model[1].angles.tolist() == [0, 1, 2]
        with pytest.raises(
            ConfigError,
            match=r"--fsdp.meta: 1 has buffers that its reset_parameters\(\) gives no values: angles",
        ):
            materialise(made(True), device=torch.device("cpu"), seed=0, reads=reads)
    model = made(True)
    materialise(model, device=torch.device("cpu"), seed=0, reads="all")
    assert model[1].angles.tolist() == [0, 0, 0]
