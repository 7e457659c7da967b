"""`ddp-kit run [launcher flags] RECIPE.py [recipe flags]`: the ranks of one machine, by a launcher of choice.

Owns: the command line up to the recipe. Refuses: the recipe's flags; `ddp_kit.train` reads and checks them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from launch import accelerate, local, torchrun
from launch.plan import LaunchError, Plan, processes_of

LAUNCHERS: dict[str, Callable[[Plan], int]] = {"local": local.run, "torchrun": torchrun.run, "accelerate": accelerate.run}


def parser() -> argparse.ArgumentParser:
    """Returns the reader of the launcher's flags."""
    made = argparse.ArgumentParser("ddp-kit run", description="Starts a recipe's ranks on this machine.", allow_abbrev=False)
    made.add_argument("--nproc-per-node", "--nproc_per_node", default="auto", metavar="N", help="ranks; auto: one for each GPU, or one")
    made.add_argument("--launcher", choices=LAUNCHERS, default="local", help="local (default) starts them without importing torch itself")
    made.add_argument("words", nargs=argparse.REMAINDER, metavar="RECIPE.py [recipe flags]", help="`RECIPE.py --help` lists its flags")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: the exit code of the first rank that failed, 2 for usage, else 0."""
    try:
        asked = parser().parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:  # argparse has said what is wrong
        return int(end.code or 0)
    try:
        plan = Plan(words=tuple(asked.words), processes=processes_of(asked.nproc_per_node))
        return LAUNCHERS[asked.launcher](plan)
    except LaunchError as error:
        print(f"ddp-kit run: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
