"""`ddp-kit plan` says what real ranks hold, send and write."""

import json
import os
import re
import socket
import stat
import struct
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Net, Split, split
from cases import classify, normed, vectors
from paths import KIT

from ddp_kit import Data, Objective
from ddp_kit.checkpoint.own_loop import save
from ddp_kit.cli.plan.command import main
from ddp_kit.cli.plan.costs import Costs, costs_of
from ddp_kit.cli.plan.fake_group import fake_group
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.settings import DeepSpeed, Fsdp
from ddp_kit.setup.build import build
from ddp_kit.strategies.deepspeed.config import config_of
from ddp_kit.testing import run_ranks
from ddp_kit.training.step import train_step

WIDTH = 256  # 300,000 parameters: what else is sent in a step does not count
BYTES_SENT = 200  # of struct tcp_info in linux/tcp.h: tcpi_bytes_sent, since Linux 4.19
CHOICES: list[dict[str, Any]] = [
    {},
    {"comm": "bf16"},
    {"strategy": "zero1"},
    {"strategy": "fsdp", "fsdp": Fsdp(wrap=("Block",)), "micro_batch": 3},
    {"micro_batch": 3},
    {"strategy": "fsdp"},
    {"strategy": "fsdp", "fsdp": Fsdp(wrap=("Block",))},
    {"strategy": "fsdp", "fsdp": Fsdp(wrap=("Block",)), "precision": "bf16"},
]
EVERY_PUSH = range(4)  # with 2 ranks


if find_spec("deepspeed") is not None:
    CHOICES += [
        {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=stage), "micro_batch": micro}
        for stage in (0, 1, 2, 3)
        for micro in (0, 3)
    ]


def wide() -> Net:
    return Net(WIDTH)


def settings_of(choice: dict[str, Any]) -> Split:
    return Split(**({"precision": "fp32"} | choice))


def planned(settings: Split, ranks: int) -> Costs:
    plan = plan_batches(
        settings.global_batch, micro_batch=int(settings.micro_batch), world_size=ranks
    )
    with fake_group(ranks=ranks, ranks_per_node=8) as group:
        return costs_of(split(settings, model=wide), settings, plan, group=group, backend="gloo")


def sent() -> int:
    """Returns the bytes that this process's connections have sent so far, as the kernel counted them."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        try:
            if stat.S_ISSOCK(os.fstat(int(path.name)).st_mode):
                with socket.socket(fileno=os.dup(int(path.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += (
                        struct.unpack_from("Q", info, BYTES_SENT)[0]
                        if len(info) >= BYTES_SENT + 8
                        else 0
                    )
        except OSError:  # the listing's own descriptor, or no TCP
            continue
    return total


def measured(choice: dict[str, Any], folder: str) -> dict[str, int]:
    """Returns what this rank holds after two steps, and sent in a third."""
    from ddp_kit.distributed.process_group import process_group

    settings = settings_of(choice)
    with process_group(device="cpu") as group:
        return _measured(group, settings, folder)


def _measured(group: Group, settings: Split, folder: str) -> dict[str, int]:
    made = build(split(settings, model=wide, train_data=lambda: Data(vectors())), settings, group)
    training = made.training
    batches = made.feed.batches(start=0, end=4)
    for _ in range(2):
        train_step(training, next(batches))
    before = sent()
    stepped: list[int] = []
    take = training.strategy.gradients
    training.strategy.gradients = lambda parameters: (
        stepped.append(sum(part.nbytes for part in take(parameters))) or take(parameters)
    )  # type: ignore[method-assign]  # to look
    for _ in range(2):
        train_step(training, next(batches))
    gradients = stepped[0]
    step = (sent() - before) // 2
    save(training, folder)
    training.checkpoints.finish(failures=1)
    training.control_packet.close()
    optimizer = training.objectives[0].optimizer
    assert training.average is not None
    partitions = []
    if settings.strategy == "deepspeed" and settings.deepspeed.stage == 3:
        # DeepSpeed takes them out of the groups between steps.
        partitions = list(optimizer.state)
    elif settings.strategy == "deepspeed" and settings.deepspeed.stage:
        for own in optimizer.param_groups:
            partitions += own["params"]
    moments = 0
    for own in optimizer.state.values():
        moments += sum(local(value).nbytes for value in own.values())
    return {
        "weights": sum(local(p).nbytes for p in training.model.parameters())
        + sum(p.nbytes for p in partitions),
        "gradients": gradients,
        "moments": moments,
        "average": sum(tensor.nbytes for tensor in training.average.averages),
        "sent": step,
    }


@pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel's count of bytes sent is read from Linux's tcp_info"
)
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(own, marks=() if i in EVERY_PUSH else pytest.mark.slow)
        for i, own in enumerate(CHOICES)
    ],
    ids=lambda choice: "-".join(str(value) for value in choice.values()) or "ddp",
)
def test_what_is_planned_is_what_real_ranks_hold_send_and_write_within_5_percent(
    choice: dict[str, Any], ranks: int, tmp_path: Path
) -> None:
    costs = planned(settings_of(choice), ranks)
    found = run_ranks(measured, ranks, choice, str(tmp_path), group=False)
    for name in ("weights", "gradients", "moments", "average"):
        assert getattr(costs, name) == pytest.approx(max(own[name] for own in found), rel=0.05), (
            name
        )
    assert costs.sent == pytest.approx(sum(own["sent"] for own in found) / ranks, rel=0.05)
    manifest = json.loads(next(tmp_path.rglob("manifest.json")).read_text())
    sizes = [
        content[0] for name, content in manifest["files"].items() if name.endswith(".safetensors")
    ]
    assert costs.checkpoint == pytest.approx(sum(sizes), rel=0.05)
    assert costs.written == pytest.approx(max(sizes), rel=0.05)


def test_64_ranks_are_planned_without_starting_any(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(KIT / "blocky.py")
    flags = ["--ranks", "64", "--global-batch", "128", "--strategy", "fsdp", "--fsdp.wrap", "Block"]
    assert main([recipe, *flags, "--gpu-memory-gib", "80"]) == 0
    said = capsys.readouterr().out
    assert "fsdp on 64 ranks: 1,661 parameters, fp64" in said
    assert "fits 80 GiB: 80.00 GiB are left" in said
    assert main([recipe, *flags, "--gpu-memory-gib", "0.00001"]) == 1
    assert re.search(
        r"does not fit 1e-05 GiB: .* Type --fsdp.cpu-offload, or start more ranks",
        capsys.readouterr().out,
    )
    assert main([recipe, "--ranks", "0"]) == 2
    assert "--ranks 0: expected at least 1" in capsys.readouterr().err


def test_frozen_weights_optimizers_without_state_and_models_that_need_values_are_planned() -> None:
    def sgd(momentum: float) -> Any:
        return lambda model: torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=momentum
        )  # holds frozen parameters too

    def valued() -> Net:
        assert torch.linspace(0, 1, 3)[2].item() == 1  # the rates of layers, say
        return wide()

    settings, plan = (
        Split(precision="fp32", ema=0.0, strategy="zero1"),
        plan_batches(24, micro_batch=0, world_size=2),
    )
    trained = sum(parameter.nbytes for parameter in wide().parameters() if parameter.requires_grad)
    for strategy, momentum, moments in (("ddp", 0.9, trained), ("zero1", 0.0, 0), ("ddp", 0.0, 0)):
        own = replace(settings, strategy=strategy)
        with fake_group(ranks=2, ranks_per_node=8) as group:
            costs = costs_of(
                split(own, model=valued, optimizer=sgd(momentum)),
                own,
                plan,
                group=group,
                backend="gloo",
            )
        assert costs.moments == moments


def test_an_optimizer_that_training_would_refuse_is_not_planned() -> None:
    """Adagrad has sums before its first step."""
    plan = plan_batches(24, micro_batch=0, world_size=2)
    for fields in (
        {"strategy": "zero1"},
        {"strategy": "deepspeed", "deepspeed": DeepSpeed(stage=1)},
    ):
        settings = Split(precision="fp32", **fields)
        recipe = split(
            settings,
            optimizer=lambda model: torch.optim.Adagrad(
                p for p in model.parameters() if p.requires_grad
            ),
        )
        with (
            fake_group(ranks=2, ranks_per_node=8) as group,
            pytest.raises(ConfigError, match="has state before the first step"),
        ):
            costs_of(recipe, settings, plan, group=group, backend="gloo")


def test_a_model_with_running_statistics_is_gathered_in_fp32_whatever_the_precision() -> None:
    """As `fsdp` does it in training."""
    plan = plan_batches(24, micro_batch=0, world_size=2)

    def sent(model: Any, precision: Any) -> int:
        settings = Split(precision=precision, strategy="fsdp")
        with fake_group(ranks=2, ranks_per_node=8) as group:
            return costs_of(
                split(settings, model=model), settings, plan, group=group, backend="nccl"
            ).sent

    assert sent(normed, "bf16") == sent(normed, "fp32")
    assert sent(Net, "bf16") < sent(Net, "fp32")


def test_an_optimizer_that_needs_numbers_is_named() -> None:
    settings, plan = Split(precision="fp32"), plan_batches(24, micro_batch=0, world_size=2)
    recipe = split(
        settings,
        optimizer=lambda model: torch.optim.Adafactor(
            p for p in model.parameters() if p.requires_grad
        ),
    )
    with (
        fake_group(ranks=2, ranks_per_node=8) as group,
        pytest.raises(ConfigError, match="Adafactor reads numbers as it steps"),
    ):
        costs_of(recipe, settings, plan, group=group, backend="gloo")


def test_every_objective_has_a_state_and_a_sum_of_its_own() -> None:
    def adam(model: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(p for p in model.parameters() if p.requires_grad)

    settings, plan, found = (
        Split(precision="fp32"),
        plan_batches(24, micro_batch=0, world_size=2),
        [],
    )
    for trains in (("",), ("", "last")):
        parts = [Objective(loss=classify, optimizer=adam, trains=name) for name in trains]
        with fake_group(ranks=2, ranks_per_node=8) as group:
            recipe = split(settings, loss=None, optimizer=None, objectives=parts)
            found.append(costs_of(recipe, settings, plan, group=group, backend="gloo"))
    last = sum(parameter.nbytes for parameter in Net().last.parameters())
    assert found[1].moments - found[0].moments == pytest.approx(2 * last, abs=16)
    assert found[1].sent - found[0].sent == last


def test_limits_in_deepspeeds_own_file_are_planned_with(tmp_path: Path) -> None:
    """A bucket of 50 numbers and no weights kept: what is whole for a moment is little, and weights are gathered again in backward."""
    file, plan, found = tmp_path / "limits.json", plan_batches(24, micro_batch=0, world_size=2), []
    file.write_text(
        json.dumps(
            {"zero_optimization": {"reduce_bucket_size": 50, "stage3_max_live_parameters": 0}}
        )
    )
    for config in ("", str(file)):
        settings = Split(
            precision="fp32",
            ema=0.0,
            strategy="deepspeed",
            deepspeed=DeepSpeed(stage=3, config=config),
        )
        with fake_group(ranks=2, ranks_per_node=8) as group:
            found.append(costs_of(split(settings), settings, plan, group=group, backend="nccl"))
    assert found[1].gathered == 2 * 50 * 4 < found[0].gathered
    assert found[1].sent == pytest.approx(1.5 * found[0].sent, rel=0.1)


def test_what_training_would_refuse_is_not_planned_and_what_does_not_fit_is_told_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, recipe = tmp_path / "auto.json", str(KIT / "blocky.py")
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": "auto"}}))
    with pytest.raises(
        ConfigError, match=r'zero_optimization\.reduce_bucket_size: "auto" is for others to fill in'
    ):
        config_of(DeepSpeed(config=str(file)))
    assert (
        main([recipe, "--exact", "--micro-batch", "6", "--global-batch", "24", "--ranks", "3"]) == 2
    )
    assert "24 / 6 = 4 micro-batches do not fit 3 ranks" in capsys.readouterr().err
    for args, words in (
        (["--ranks", "8"], "Type --strategy fsdp.\n"),
        (["--ranks", "1"], "Type --strategy fsdp, and start more ranks."),
        (["--ranks", "8", "--strategy", "zero1"], "Type --strategy fsdp, or start more ranks."),
        (["--ranks", "1", "--strategy", "zero1"], "Start more ranks."),
    ):
        assert main([recipe, "--gpu-memory-gib", "0.00001", *args]) == 1
        assert words in capsys.readouterr().out


def test_help_lists_the_commands_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--gpu-memory-gib" in capsys.readouterr().out


def test_a_model_larger_than_this_machine_is_planned() -> None:
    """13 thousand million parameters in fp32 and AdamW's moments: 200 GiB, of which nothing is allocated."""
    settings = Split(
        precision="fp32", ema=0.0, strategy="fsdp", fsdp=Fsdp(wrap=("Block",)), global_batch=64
    )
    plan = plan_batches(64, micro_batch=0, world_size=64)
    with fake_group(ranks=64, ranks_per_node=8) as group:
        costs = costs_of(
            split(settings, model=lambda: Net(65536)), settings, plan, group=group, backend="nccl"
        )
    assert costs.parameters > 17e9
    assert costs.weights == pytest.approx(4 * costs.parameters / 64, rel=0.01)
    assert costs.checkpoint == pytest.approx(4 * 3 * costs.parameters, rel=0.3)
