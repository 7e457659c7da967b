"""`ddp-kit check RECIPE.py [--field value ...]`: does it run, what does it need, how long will it take. Leaves nothing.

Owns: two training steps, a bounded evaluation, and the figures that follow from them.
Refuses: a run directory.
"""

import itertools
import time
from collections.abc import Sequence

from ddp_kit.config.command_line import parse
from ddp_kit.data import batch_plan
from ddp_kit.distributed.local_shard import size
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.lifecycle.session import recipe_path, run_command, session
from ddp_kit.recipe import load_recipe
from ddp_kit.setup.build import Composition, compose, require_same_settings
from ddp_kit.trackers.console import duration, evaluation_line
from ddp_kit.training.reporter import peak_memory_mib
from ddp_kit.training.step import train_step

EVALUATED = 4  # micro-batches a rank


def main(argv: Sequence[str]) -> int:
    """The command. Works in one process or under torchrun; returns the exit code."""

    def command() -> int:
        source = load_recipe(recipe_path(argv, command="ddp-kit check"))
        settings = parse(
            source.settings, argv[1:], prog=f"ddp-kit check {argv[0]}", rank=read_topology().rank
        )
        if settings.tracker:
            raise ConfigError(
                "ddp-kit check leaves nothing, so --tracker has no effect: leave it out."
            )
        with session(settings) as group:
            require_same_settings(group, settings, text=source.text)
            made = compose(source.build(settings), settings, group)
            lines = _figures(made, group)
            if group.rank == 0:
                print("\n".join(lines))
        return 0

    return run_command(command)


def _figures(made: Composition, group: Group) -> list[str]:
    """Runs two steps and some evaluation micro-batches. Returns what to print."""
    training, pace, evaluator = made.training, made.pace, made.evaluator
    times = []
    batches = made.feed.batches(start=0, end=min(2, pace.end))
    for _ in range(2):
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is not None:
            train_step(training, batch)
        times.append(time.perf_counter() - begin)
    training.control.close()
    batches.close()
    trained_s = min(times)
    weights = sum(size(parameter) for parameter in training.model.parameters())
    lines = [
        f"batch   {batch_plan.describe(training.plan)}",
        f"model   {weights:,} parameters",
        f"step    {trained_s:.3g} s, {training.plan.global_batch / trained_s:,.0f} samples/s (the first one {times[0]:.3g} s)",
    ]
    evaluated_s = 0.0
    if evaluator.sets:
        begin = time.perf_counter()
        metrics = evaluator(training.model, average=training.average, limit=EVALUATED)
        each_s = (time.perf_counter() - begin) / (EVALUATED * len(evaluator.sets))
        sizes = [len(data) for data in evaluator.sets.values() if not data.is_iterable]
        evaluated_s = (
            sum(-(-size // (evaluator.micro_batch * group.world_size)) for size in sizes) * each_s
        )
        lines.append(
            evaluation_line({"kind": "eval   ", "step": training.step, **metrics})
            + f"  (of {EVALUATED} micro-batches a rank)"
        )
    evaluations = (
        sum(pace.evaluates(step) for step in itertools.islice(range(1, pace.end + 1), 10_000_000))
        if evaluator.sets
        else 0
    )
    lines += [
        f"memory  {peak_memory_mib(group.device):,.0f} MiB at the peak of a rank",
        f"time    about {duration(pace.end * trained_s + evaluations * evaluated_s)} for {pace.end:,} steps and {evaluations} evaluations",
        *(f"note    {note}" for note in training.notes),
        "It runs. Nothing was written.",
    ]
    return lines
