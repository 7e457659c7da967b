"""`ddp-kit plan RECIPE.py --ranks 64 [--gpu-memory-gib 80] [recipe flags]`: what it would cost, without a GPU or 64 processes.

Owns: its own flags and the table. `costs` finds the figures.
Refuses: starting ranks, and saying that something fits that was not counted: activations are named as what remains.
"""

import argparse
from collections.abc import Sequence

from ddp_kit.cli.plan.costs import Costs, costs_of, fake_group
from ddp_kit.config.command_line import parse
from ddp_kit.data.batch_plan import BatchPlan, describe, plan_batches, require_subtrees
from ddp_kit.data.dataset import as_data
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.lifecycle.session import recipe_path, run_command
from ddp_kit.recipe import Recipe, load_recipe
from ddp_kit.settings import Settings

GIB, MIB = 2**30, 2**20


def main(argv: Sequence[str]) -> int:
    """The command. Returns the exit code: 1 if the parts that are counted do not fit the GPU's memory."""

    def command() -> int:
        parser = argparse.ArgumentParser(
            prog="ddp-kit plan RECIPE.py [--field value ...]", allow_abbrev=False, add_help=False
        )
        parser.add_argument(
            "--ranks", type=int, default=8, help="how many there would be (default: 8)"
        )
        parser.add_argument(
            "--ranks-per-node", type=int, default=8, help="for --fsdp.hybrid (default: 8)"
        )
        parser.add_argument(
            "--gpu-memory-gib",
            type=float,
            default=0.0,
            help="memory of a GPU: exit code 1 if it is too little",
        )
        parser.add_argument(
            "--backend",
            choices=("nccl", "gloo"),
            default="nccl",
            help="how bytes travel (default: nccl)",
        )
        given, rest = parser.parse_known_args(argv)
        if {"-h", "--help"} & set(rest):
            print(parser.format_help())
        source = load_recipe(recipe_path(rest, command="ddp-kit plan"))
        settings = parse(source.settings, rest[1:], prog=f"ddp-kit plan {rest[0]}")
        _refuse(given, settings)
        micro_batch = settings.micro_batch if isinstance(settings.micro_batch, int) else 0
        plan = plan_batches(settings.global_batch, micro_batch=micro_batch, world_size=given.ranks)
        if settings.exact:
            require_subtrees(plan, world_size=given.ranks)
        recipe = source.build(settings)
        with fake_group(ranks=given.ranks, ranks_per_node=given.ranks_per_node) as group:
            costs = costs_of(recipe, settings, plan, group=group, backend=given.backend)
        print(
            "\n".join(
                _lines(costs, settings, plan, steps=_steps(recipe, settings), ranks=given.ranks)
            )
        )
        return _verdict(
            costs,
            given.gpu_memory_gib,
            settings=settings,
            ranks=given.ranks,
            objectives=len(recipe.parts()),
        )

    return run_command(command)


def _refuse(given: argparse.Namespace, settings: Settings) -> None:
    faults = [
        f"--{name.replace('_', '-')} {getattr(given, name)}: expected at least 1"
        for name in ("ranks", "ranks_per_node")
        if getattr(given, name) < 1
    ]
    if not given.gpu_memory_gib >= 0:
        faults.append(f"--gpu-memory-gib {given.gpu_memory_gib}: expected 0 (not asked) or more")
    if faults:
        raise ConfigError("\n".join(faults))


def _steps(recipe: Recipe, settings: Settings) -> str:
    """Returns how many optimizer steps the run has; the data may not be here."""
    if not settings.epochs:
        return f"{settings.max_steps:,}"
    try:
        size = len(as_data(recipe.train_data()))
    except (DdpKitError, OSError, TypeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0].removesuffix(" Looked for:")
        return f"{settings.epochs} epochs (of how many steps is not known here: {reason})"
    each = size // settings.global_batch
    return f"{min(settings.epochs * each, settings.max_steps or settings.epochs * each):,} ({each:,} an epoch)"


def _lines(
    costs: Costs, settings: Settings, plan: BatchPlan, *, steps: str, ranks: int
) -> list[str]:
    rows = [
        ("weights", costs.weights, ""),
        ("gradients", costs.gradients, ""),
        ("optimizer", costs.moments, "its state, on the rank that has most"),
        *([("ema", costs.average, "")] if costs.average else []),
        *([("buffers", costs.buffers, "")] if costs.buffers else []),
        *(
            [
                (
                    "gathered",
                    costs.gathered,
                    "weights and gradients that are whole for a moment, at most",
                )
            ]
            if costs.gathered
            else []
        ),
        (
            "together",
            costs.held,
            f"{'of it on the GPU, ' if costs.is_offloaded else ''}without activations and what libraries take for themselves",
        ),
    ]
    return [
        f"{f'{settings.strategy} on {ranks} ranks' if ranks > 1 else '1 rank'}: {costs.parameters:,} parameters, {settings.precision}",
        f"batch       {describe(plan)}",
        f"steps       {steps}",
        "memory of a rank",
        *(
            f"  {name:<10}{amount(size):>12}{f'   {note}' if note else ''}"
            for name, size, note in rows
        ),
        f"sent        {amount(costs.sent)} by a rank in a step",
        f"checkpoint  {amount(costs.checkpoint)}, of which a rank writes up to {amount(costs.written)}",
    ]


def amount(size: float) -> str:
    """Returns bytes as MiB or GiB."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / MIB:,.2f} MiB"


def _verdict(
    costs: Costs, memory_gib: float, *, settings: Settings, ranks: int, objectives: int
) -> int:
    if not memory_gib:
        return 0
    left = memory_gib * GIB - costs.held
    if left < 0:
        print(
            f"does not fit {memory_gib:g} GiB: {amount(-left)} too much. {_advice(settings, ranks=ranks, objectives=objectives)}"
        )
        return 1
    print(f"fits {memory_gib:g} GiB: {amount(left)} are left for activations and libraries.")
    return 0


def _advice(settings: Settings, *, ranks: int, objectives: int) -> str:
    """Returns what would make a rank hold less."""
    is_split = {
        "ddp": False,
        "zero1": True,
        "fsdp": not settings.fsdp.hybrid,
        "deepspeed": settings.deepspeed.stage > 0,
    }[settings.strategy]
    less = {
        "fsdp": "--fsdp.cpu-offload"
        if settings.fsdp.wrap or settings.fsdp.wrap_size
        else "--fsdp.wrap CLASS, of its blocks",
        "deepspeed": "--strategy fsdp" if settings.deepspeed.stage == 3 else "--deepspeed.stage 3",
    }.get(settings.strategy, "--strategy fsdp")
    if objectives > 1:  # which zero1 alone can split
        less = "" if settings.strategy == "zero1" else "--strategy zero1"
    if settings.fsdp.cpu_offload or (is_split and ranks == 1):
        less = ""
    if ranks == 1 and less:
        return f"Type {less}, and start more ranks."
    if less:
        return f"Type {less}, or start more ranks." if is_split else f"Type {less}."
    return (
        "Start more ranks."
        if is_split
        else "No strategy makes it less: take a smaller model, or GPUs with more memory."
    )
