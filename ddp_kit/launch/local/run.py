"""`ddp-kit run [launcher flags] RECIPE.py [recipe flags]`: the ranks of one machine, by a launcher of choice.

Owns: the command line up to the recipe. Refuses: the recipe's flags; `ddp_kit.train` reads and checks them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from ddp_kit.launch.environment import visible_gpus
from ddp_kit.launch.local import accelerate, processes, torchrun
from ddp_kit.launch.plan import Plan, answered, processes_of

LAUNCHERS: dict[str, Callable[[Plan], int]] = {
    "local": processes.run,
    "torchrun": torchrun.run,
    "accelerate": accelerate.run,
}


def parser() -> argparse.ArgumentParser:
    """Returns the reader of the launcher's flags."""
    made = argparse.ArgumentParser(
        "ddp-kit run", description="Starts a recipe's ranks on this machine.", allow_abbrev=False
    )
    made.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        metavar="N",
        help="ranks; auto (default): one for each GPU, or one",
    )
    made.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="local",
        help="local (default) starts them without importing torch itself",
    )
    made.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="accelerate's YAML; default: the one that `accelerate config` has left",
    )
    made.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="RECIPE.py [recipe flags]",
        help="`RECIPE.py --help` lists its flags",
    )
    return made


def plan_of(asked: argparse.Namespace) -> Plan:
    """Returns what the flags ask for. Raises: LaunchError."""
    text, gpus = asked.nproc_per_node, visible_gpus()
    if asked.launcher == "accelerate" or asked.accelerate_config:
        given = None if text is None else processes_of(text, gpus=gpus)
        _, counted = accelerate.agreed(
            given,
            nodes=1,
            config=accelerate.config_of(asked.accelerate_config, launcher=asked.launcher),
        )
        text = text if counted is None else str(counted)
    return Plan(words=tuple(asked.words), processes=processes_of(text or "auto", gpus=gpus))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: the exit code of the first rank that failed, 2 for usage, else 0."""
    return answered(
        "run",
        lambda words: LAUNCHERS[(asked := parser().parse_args(words)).launcher](plan_of(asked)),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
