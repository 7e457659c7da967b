"""torchrun as the launcher: `ddp-kit run --launcher torchrun --nproc-per-node 8 RECIPE.py [recipe flags]`."""

from typing import NoReturn

from ddp_kit.launch.environment import become
from ddp_kit.launch.plan import Plan


def command(plan: Plan) -> list[str]:
    """Returns torchrun's command line; its store gets a free port of its own choice."""
    agent = [
        plan.python,
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        f"--nproc-per-node={plan.processes}",
        "--rdzv-backend=c10d",
    ]
    return [*agent, "--rdzv-endpoint=127.0.0.1:0", "-m", "ddp_kit.train", *plan.words]


def run(plan: Plan) -> NoReturn:
    """Becomes torchrun, which flattens a rank's exit code to 1: the run's status.json holds the real one."""
    become(command(plan))
