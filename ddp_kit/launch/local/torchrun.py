"""torchrun as the launcher: `ddp-kit run --launcher torchrun RECIPE.py [recipe flags]`."""

from typing import NoReturn

from ddp_kit.launch.environment import become
from ddp_kit.launch.plan import Plan


def command(plan: Plan) -> list[str]:
    """Returns torchrun's command line; its store gets a free port of its own choice."""
    return [
        plan.python,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={plan.processes}",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=127.0.0.1:0",
        "-m",
        "ddp_kit.train",
        *plan.words,
    ]


def run(plan: Plan) -> NoReturn:
    """Becomes torchrun.

    That flattens a rank's exit code to 1: the run's status.json holds the real one.
    """
    become(command(plan))
