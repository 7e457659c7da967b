"""`ddp-kit check RECIPE.py [--field value ...]`: does it run, what does it need, how long it takes.

It trains two steps, evaluates a few micro-batches and leaves nothing, not even a run directory.
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
from ddp_kit.setup.build import Built, build, require_same_settings
from ddp_kit.trackers.console import duration, evaluation_line
from ddp_kit.training.reporter import peak_memory_mib
from ddp_kit.training.step import train_step

STEPS = 2
EVALUATED = 4  # micro-batches a rank
COUNTED = 10_000_000  # steps; evaluations after that many are not counted


def main(argv: Sequence[str]) -> int:
    """The command. Works in one process or under torchrun; returns the exit code."""
    return run_command(lambda: _check(argv))


def _check(argv: Sequence[str]) -> int:
    source = load_recipe(recipe_path(argv, command="ddp-kit check"))
    prog = f"ddp-kit check {argv[0]}"
    settings = parse(source.settings, argv[1:], prog=prog, rank=read_topology().rank)
    if settings.tracker:
        raise ConfigError("ddp-kit check leaves nothing, so --tracker has no effect: leave it out.")
    with session(settings) as group:
        require_same_settings(group, settings, text=source.text)
        made = build(source.build(settings), settings, group)
        lines = _figures(made, group)
        if group.rank == 0:
            print("\n".join(lines))
    return 0


def _figures(made: Built, group: Group) -> list[str]:
    """Trains and evaluates. Returns what to print. Every rank calls it."""
    training = made.training
    times = _train(made)
    step_s = min(times)
    samples_per_s = training.plan.global_batch / step_s
    weights = sum(size(parameter) for parameter in training.model.parameters())
    lines = [
        f"batch   {batch_plan.describe(training.plan)}",
        f"model   {weights:,} parameters",
        f"step    {step_s:.3g} s, {samples_per_s:,.0f} samples/s (the first one {times[0]:.3g} s)",
    ]
    end = made.cadence.end
    run_s = end * step_s
    evaluations = 0
    if made.evaluator.sets:
        line, evaluation_s = _evaluate(made, group)
        lines.append(line)
        steps = itertools.islice(range(1, end + 1), COUNTED)
        evaluations = sum(made.cadence.evaluates(step) for step in steps)
        run_s += evaluations * evaluation_s
    lines += [
        f"memory  {peak_memory_mib(group.device):,.0f} MiB at the peak of a rank",
        f"time    about {duration(run_s)} for {end:,} steps and {evaluations} evaluations",
    ]
    lines += [f"note    {note}" for note in training.notes]
    lines.append("It runs. Nothing was written.")
    return lines


def _train(made: Built) -> list[float]:
    """Trains the first steps. Returns the seconds that each took, its batch included."""
    times = []
    batches = made.feed.batches(start=0, end=min(STEPS, made.cadence.end))
    for _ in range(STEPS):
        begin = time.perf_counter()
        batch = next(batches, None)
        if batch is not None:
            train_step(made.training, batch)
        times.append(time.perf_counter() - begin)
    made.training.control_packet.close()
    batches.close()
    return times


def _evaluate(made: Built, group: Group) -> tuple[str, float]:
    """Evaluates some micro-batches of each set. Returns a line, and the seconds for all of them."""
    evaluator = made.evaluator
    training = made.training
    begin = time.perf_counter()
    metrics = evaluator(training.model, average=training.average, limit=EVALUATED)
    micro_batch_s = (time.perf_counter() - begin) / (EVALUATED * len(evaluator.sets))
    samples_at_once = evaluator.micro_batch * group.world_size
    micro_batches = 0
    for data in evaluator.sets.values():
        # The length of an iterable set is not known.
        if not data.is_iterable:
            micro_batches += -(-len(data) // samples_at_once)
    line = evaluation_line({"kind": "eval   ", "step": training.step, **metrics})
    return f"{line}  (of {EVALUATED} micro-batches a rank)", micro_batches * micro_batch_s
