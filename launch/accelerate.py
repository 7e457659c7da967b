"""accelerate as the launcher: `python -m launch.accelerate --nproc-per-node 8 RECIPE.py [recipe flags]`."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from launch.plan import LaunchError, Plan, clean, processes_of


def command(plan: Plan) -> list[str]:
    """Returns accelerate's command line, with every choice stated, so that no configuration file of the user's changes it."""
    agent = [plan.python, "-m", "accelerate.commands.launch", "--num_machines=1", f"--num_processes={plan.processes}"]
    kinds = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    kinds += ["--multi_gpu"] if plan.processes > 1 and processes_of("auto") > 1 else ["--cpu"] if processes_of("auto") == 1 else []
    return [*agent, *kinds, "-m", "ddp_kit.train", *plan.words]


def run(plan: Plan) -> int:
    """Becomes accelerate's launcher. Raises: LaunchError if accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise LaunchError("--launcher accelerate needs accelerate: pip install accelerate.")
    words = command(plan)
    os.execve(words[0], words, clean(os.environ))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: an exit code."""
    from launch.run import main as started

    return started(["--launcher", "accelerate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
