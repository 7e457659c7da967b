"""`ddp-kit plan RECIPE.py --ranks 64 [recipe flags]`: what it would cost, without 64 processes.

It never says that something fits that was not counted: activations are named as what remains.
"""

import argparse
from collections.abc import Sequence

from ddp_kit.cli.plan.costs import Costs, costs_of
from ddp_kit.cli.plan.fake_group import fake_group
from ddp_kit.config.command_line import parse
from ddp_kit.data.batch_plan import BatchPlan, describe, plan_batches, require_subtrees
from ddp_kit.data.dataset import as_data
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.lifecycle.session import recipe_path, run_command
from ddp_kit.recipe import Recipe, load_recipe
from ddp_kit.settings import Settings

GIB = 2**30
MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """The command. Returns: the exit code, 1 if what is counted does not fit the GPU's memory."""
    return run_command(lambda: _plan(argv))


def _plan(argv: Sequence[str]) -> int:
    parser = _parser()
    given, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    source = load_recipe(recipe_path(rest, command="ddp-kit plan"))
    settings = parse(source.settings, rest[1:], prog=f"ddp-kit plan {rest[0]}")
    _refuse(given)
    micro_batch = 0  # "auto" is not known here
    if isinstance(settings.micro_batch, int):
        micro_batch = settings.micro_batch
    plan = plan_batches(settings.global_batch, micro_batch=micro_batch, world_size=given.ranks)
    if settings.exact:
        require_subtrees(plan, world_size=given.ranks)
    recipe = source.build(settings)
    with fake_group(ranks=given.ranks, ranks_per_node=given.ranks_per_node) as group:
        costs = costs_of(recipe, settings, plan, group=group, backend=given.backend)
    steps = _steps(recipe, settings)
    print("\n".join(_lines(costs, settings, plan, steps=steps, ranks=given.ranks)))
    if not given.gpu_memory_gib:
        return 0
    memory = f"{given.gpu_memory_gib:g} GiB"
    left = given.gpu_memory_gib * GIB - costs.held
    if left >= 0:
        print(f"fits {memory}: {amount(left)} are left for activations and libraries.")
        return 0
    advice = _advice(settings, ranks=given.ranks, objectives=len(recipe.parts()))
    print(f"does not fit {memory}: {amount(-left)} too much. {advice}")
    return 1


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's own flags; a recipe's flags are left to the recipe."""
    parser = argparse.ArgumentParser(
        prog="ddp-kit plan RECIPE.py [--field value ...]", allow_abbrev=False, add_help=False
    )
    parser.add_argument("--ranks", type=int, default=8, help="how many there would be (default: 8)")
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
    return parser


def _refuse(given: argparse.Namespace) -> None:
    """Raises: ConfigError for numbers that mean nothing, all of them at once."""
    faults = []
    if given.ranks < 1:
        faults.append(f"--ranks {given.ranks}: expected at least 1")
    if given.ranks_per_node < 1:
        faults.append(f"--ranks-per-node {given.ranks_per_node}: expected at least 1")
    if not given.gpu_memory_gib >= 0:
        faults.append(f"--gpu-memory-gib {given.gpu_memory_gib}: expected 0 (not asked) or more")
    if faults:
        raise ConfigError("\n".join(faults))


def _steps(recipe: Recipe, settings: Settings) -> str:
    """Returns how many optimizer steps the run has, in words: the data may not be here."""
    if not settings.epochs:
        return f"{settings.max_steps:,}"
    try:
        size = len(as_data(recipe.train_data()))
    except (DdpKitError, OSError, TypeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0].removesuffix(" Looked for:")
        return f"{settings.epochs} epochs (of how many steps is not known here: {reason})"
    per_epoch = size // settings.global_batch
    steps = settings.epochs * per_epoch
    if settings.max_steps:
        steps = min(steps, settings.max_steps)
    return f"{steps:,} ({per_epoch:,} an epoch)"


def _lines(
    costs: Costs, settings: Settings, plan: BatchPlan, *, steps: str, ranks: int
) -> list[str]:
    where = "1 rank"
    if ranks > 1:
        where = f"{settings.strategy} on {ranks} ranks"
    written = f"of which a rank writes up to {amount(costs.written)}"
    return [
        f"{where}: {costs.parameters:,} parameters, {settings.precision}",
        f"batch       {describe(plan)}",
        f"steps       {steps}",
        "memory of a rank",
        *_memory(costs),
        f"sent        {amount(costs.sent)} by a rank in a step",
        f"checkpoint  {amount(costs.checkpoint)}, {written}",
    ]


def _memory(costs: Costs) -> list[str]:
    """Returns the rows of the table; what a run does not have is left out."""
    rows = [("weights", costs.weights, ""), ("gradients", costs.gradients, "")]
    rows.append(("optimizer", costs.moments, "its state, on the rank that has most"))
    if costs.average:
        rows.append(("ema", costs.average, ""))
    if costs.buffers:
        rows.append(("buffers", costs.buffers, ""))
    if costs.gathered:
        note = "weights and gradients that are whole for a moment, at most"
        rows.append(("gathered", costs.gathered, note))
    note = "without activations and what libraries take for themselves"
    if costs.is_offloaded:
        note = f"of it on the GPU, {note}"
    rows.append(("together", costs.held, note))
    return [f"  {name:<10}{amount(size):>12}   {note}".rstrip() for name, size, note in rows]


def amount(size: float) -> str:
    """Returns bytes as MiB or GiB."""
    if size >= GIB:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / MIB:,.2f} MiB"


def _advice(settings: Settings, *, ranks: int, objectives: int) -> str:
    """Returns what would make a rank hold less."""
    is_split = {
        "ddp": False,
        "zero1": True,
        "fsdp": not settings.fsdp.hybrid,
        "deepspeed": settings.deepspeed.stage > 0,
    }[settings.strategy]
    flags = _flags_that_split_more(settings, objectives=objectives)
    if settings.fsdp.cpu_offload or (is_split and ranks == 1):
        flags = ""
    if ranks == 1 and flags:
        return f"Type {flags}, and start more ranks."
    if flags and is_split:
        return f"Type {flags}, or start more ranks."
    if flags:
        return f"Type {flags}."
    if is_split:
        return "Start more ranks."
    return "No strategy makes it less: take a smaller model, or GPUs with more memory."


def _flags_that_split_more(settings: Settings, *, objectives: int) -> str:
    """Returns the flags to type, "" if there are none."""
    if objectives > 1:  # which zero1 alone can split
        return "" if settings.strategy == "zero1" else "--strategy zero1"
    if settings.strategy == "deepspeed" and settings.deepspeed.stage < 3:
        return "--deepspeed.stage 3"
    if settings.strategy != "fsdp":
        return "--strategy fsdp"
    if settings.fsdp.wrap or settings.fsdp.wrap_size:
        return "--fsdp.cpu-offload"
    return "--fsdp.wrap CLASS, of its blocks"
