"""`ddp-kit run [launcher flags] RECIPE.py [recipe flags]`: a recipe's ranks on this machine.

It reads the command line up to the recipe. The flags after it are read by `ddp_kit.train`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from ddp_kit.launch.environment import visible_gpus
from ddp_kit.launch.local import accelerate, processes, torchrun
from ddp_kit.launch.plan import Plan, processes_of
from ddp_kit.launch.verbs import verb

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
    """Returns what the flags ask for. Raises: LaunchError with what is wrong with them."""
    text = asked.nproc_per_node
    gpus = visible_gpus()
    if asked.launcher == "accelerate" or asked.accelerate_config:
        given = None
        if text is not None:
            given = processes_of(text, gpus=gpus)
        config = accelerate.config_of(asked.accelerate_config, launcher=asked.launcher)
        _, counted = accelerate.agreed(given, nodes=1, config=config)
        if counted is not None:
            text = str(counted)
    return Plan(words=tuple(asked.words), processes=processes_of(text or "auto", gpus=gpus))


@verb("run")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: the exit code of the first rank that failed, 2 for usage, else 0."""
    asked = parser().parse_args(argv)
    return LAUNCHERS[asked.launcher](plan_of(asked))


if __name__ == "__main__":
    sys.exit(main())
