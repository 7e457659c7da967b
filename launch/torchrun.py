"""torchrun as the launcher: `python -m launch.torchrun --nproc-per-node 8 RECIPE.py [recipe flags]`."""

import os
import sys
from collections.abc import Sequence

from launch.plan import Plan, clean


def command(plan: Plan) -> list[str]:
    """Returns torchrun's command line; its store gets a free port of its own choice."""
    agent = [plan.python, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={plan.processes}", "--rdzv-backend=c10d"]
    return [*agent, "--rdzv-endpoint=127.0.0.1:0", "-m", "ddp_kit.train", *plan.words]


def run(plan: Plan) -> int:
    """Becomes torchrun, which flattens a rank's exit code to 1: the run's status.json holds the real one."""
    words = command(plan)
    os.execve(words[0], words, clean(os.environ))


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: an exit code."""
    from launch.run import main as started

    return started(["--launcher", "torchrun", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
