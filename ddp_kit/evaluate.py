"""`python -m ddp_kit.evaluate RECIPE.py --from RUN [--best] [--field value ...]`: evaluation alone,
at any world size.

Optimizers and training data are not built. `ddp-kit evaluate` is the same in one process.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddp_kit.checkpoint.find import path_of
from ddp_kit.config.command_line import parse
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.logs import rank_log
from ddp_kit.lifecycle.session import recipe_path, run_command, session
from ddp_kit.recipe import Recipe, RecipeSource, load_recipe
from ddp_kit.settings import DeepSpeed, Fsdp, Settings
from ddp_kit.setup.build import require_same_settings
from ddp_kit.setup.format_trial import evaluation_trial
from ddp_kit.setup.memory_format import choose_memory_format, naming_the_format, placement_of
from ddp_kit.setup.model import build_model
from ddp_kit.trackers.console import evaluation_line
from ddp_kit.training.evaluation_sets import made_sets
from ddp_kit.training.recipe_evaluation import Evaluator


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Prints one line a set, and with a last line of JSON what a script wants. Returns
    the exit code.
    """
    args = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        source = load_recipe(recipe_path(args, command="python -m ddp_kit.evaluate"))
        settings = parse(
            source.settings,
            _flags(args[1:]),
            prog=f"ddp_kit.evaluate {args[0]}",
            rank=read_topology().rank,
        )
        if not settings.init_from:
            raise ConfigError(
                "evaluation needs weights: type --from runs/NAME (and --best for its best "
                "checkpoint), or --from FILE."
            )
        if "--best" in args:
            path = path_of(Path(settings.init_from), is_best=True, flag_text="--from")
            settings = replace(settings, init_from=str(path))
        # Each rank has the whole model.
        settings = replace(settings, strategy="ddp", fsdp=Fsdp(), deepspeed=DeepSpeed())
        with session(settings) as group, rank_log(None, rank=group.rank):
            require_same_settings(group, settings, text=source.text)
            _evaluate(source, settings, group)
        return 0

    return run_command(command)


def _flags(words: Sequence[str]) -> list[str]:
    """Returns a recipe's flags: --from is --init-from here, and --best is no flag of a recipe."""
    flags = []
    for word in words:
        if word == "--best":
            continue
        if word.split("=")[0] == "--from":
            word = "--init-from" + word.removeprefix("--from")
        flags.append(word)
    return flags


def _evaluate(source: RecipeSource, settings: Settings, group: Group) -> None:
    """Evaluates each set of the recipe. Every rank calls it; rank 0 prints."""
    recipe: Recipe = source.build(settings)
    kinds = {"evaluation": recipe.eval_data, "test": recipe.test_data}
    if not any(kinds.values()):
        raise ConfigError(f"{source.path.name} has neither eval_data nor test_data to evaluate.")
    model = build_model(recipe, settings, group, takes_all=True)
    # Neither "auto" nor 0 says how many samples a micro-batch has.
    micro_batch = settings.global_batch
    if isinstance(settings.micro_batch, int) and settings.micro_batch:
        micro_batch = settings.micro_batch
    sets = {}
    for what, make in kinds.items():
        if make is not None:
            sets[what] = made_sets(make, what=what, seed=settings.seed, group=group)
    placement = placement_of(model, settings, group)
    trials = []
    if placement.channels_last:
        trials += [evaluation_trial(model, recipe, own, settings, group) for own in sets.values()]
    placement = choose_memory_format(model, placement, trials, group=group)
    for what, own in sets.items():
        evaluator = Evaluator(
            recipe=recipe,
            settings=settings,
            group=group,
            sets=own,
            what=f"{what} data",
            micro_batch=micro_batch,
            placement=placement,
        )
        evaluator.compare_sets()
        with naming_the_format(placement):
            with evaluator.trial(model):
                evaluator(model, limit=1)
            metrics = evaluator(model)
        kind = "test" if what == "test" else "eval"
        if group.rank == 0:
            print(evaluation_line({"kind": kind, "step": 0, **metrics}).replace("step 0  ", ""))
            print(json_text({"kind": kind, **metrics}))


if __name__ == "__main__":
    sys.exit(main())
